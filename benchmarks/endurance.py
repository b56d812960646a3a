"""What the gateway withstands: many paced streams for a minute, memory, slow readers, a server that closes idle
connections, cut streams; with ``--real`` also a real vLLM on the CPU. Writes the table `endurance` of
`docs/performance.md`; rows that were not measured this time stay as they were.

It needs Linux, two cores and a C compiler. The gateway has the last core to itself, the upstream (C) and the readers (C
for the paced streams) share the first; only the real vLLM has both.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable

import page
from idle_race import idle_race
from machine import DidNotStart, Machine, description, machine
from memory_needed import large_bodies, open_streams
from paced import paced_streams, slow_readers
from real_vllm import real_vllm
from row import Row, Scale
from truncation import cut_streams

HEAD = ["what", "goal", "gateway", "beside it", "goal met", "measured"]
Measurement = Callable[[Machine, Scale], list[Row]]
MEASUREMENTS: dict[str, Measurement] = {
    "streams": paced_streams,
    "open": open_streams,
    "bodies": large_bodies,
    "readers": slow_readers,
    "idle": idle_race,
    "cuts": cut_streams,
    "real": real_vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAMES", help=f"comma-separated: {', '.join(MEASUREMENTS)}")
    parser.add_argument("--real", action="store_true", help="a real vLLM, too: 4 GB of memory, 2.5 GB of disk, minutes")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, printed only")
    parser.add_argument("--no-install", action="store_true", help="do not install peers and the OpenAI SDK from PyPI")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [name for name in MEASUREMENTS if name != "real"]
    names += ["real"] if options.real and "real" not in names else []
    if unknown := set(names) - set(MEASUREMENTS):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    scale = Scale(0.1 if options.quick else 1.0, install=not options.no_install)
    with machine() as here:
        for name in names:
            try:
                rows = MEASUREMENTS[name](here, scale)
            except (DidNotStart, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            for row in rows:
                print(row.text, flush=True)
            if not options.quick:
                record(rows)


def record(rows: list[Row]) -> None:
    """Into the page, each in the place that it had."""
    known = {line[0]: line for line in page.rows(page.read("endurance"))}
    today = str(datetime.date.today())
    known |= {row.what: [*row.cells, today] for row in rows}
    command = " ".join(["python benchmarks/endurance.py", *sys.argv[1:]])
    page.write(
        "endurance", f"{description()}; last: `{command}`.\n\n{page.table(HEAD, [*known.values()], align='---')}"
    )


if __name__ == "__main__":
    main()
