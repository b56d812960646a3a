"""What forwarding costs: this gateway and its peers before the same upstream, in turn, as a table and a plot for
`docs/performance.md`.

`python benchmarks/forwarding.py` measures three rounds and writes both, `--quick` one short round and only prints;
`--profile` prints where the gateway's time goes under load instead. It needs Linux, two cores, a C compiler and
`wrk`. The proxy has the last core to itself, upstream and load share the first. CPU is utime + stime of the proxy's
process tree; the upstream counts the requests and the events, so that nobody's answer is taken for more than it was.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import pstats
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import latency
import page
import plot
from machine import CHAT, DidNotStart, Machine, chat, cpu_of, description, free_port, machine, memory, post, stats
from peers import PRODUCTION_STACK, Proxy, everyone, gateway

CONNECTIONS, SLOW_CONNECTIONS, PACED_STREAMS, IDLE_STREAMS = 32, 2, 256, 1000
EVENTS, FOREVER, TICK_US, HOUR_US = 128, 1_000_000, 20_000, 3_600_000_000
# Seconds within which all idle streams have begun.
OPENING = 60.0
REQUEST, BURST, PACED, LATENCY, FIRST = (
    "CPU µs/request",
    "CPU µs/event, burst",
    "CPU µs/event, paced",
    "p50 added, µs",
    "first event added, µs",
)
COLUMNS = {
    "requests/s": ",.0f",
    REQUEST: ",.0f",
    BURST: ",.2f",
    PACED: ",.1f",
    LATENCY: ",.0f",
    FIRST: ",.0f",
    "KiB/idle stream": ",.1f",
}
RATIOS = [REQUEST, BURST, PACED, LATENCY, FIRST]
PLOTTED = [REQUEST, BURST, PACED]
OWN = "fluidmcp"
# The command ends by raising the signal that ended it, which would lose the profile.
PROFILED = """import cProfile, signal, sys; from fluidmcp_proxy.cli import main
profile = cProfile.Profile(); signal.raise_signal = lambda number: None
try: profile.runcall(main)
except SystemExit: pass
finally: profile.dump_stats({!r})"""
Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short windows, printed only")
    parser.add_argument("--profile", action="store_true", help="print where the gateway's time goes instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window of measurement")
    parser.add_argument(
        "--only", default="", metavar="NAMES", help="of the proxies, by their first words, comma-separated"
    )
    parser.add_argument("--no-install", action="store_true", help="do not install peers")
    parser.add_argument(
        "--production-stack",
        default=PRODUCTION_STACK,
        metavar="SOURCE",
        help="what pip installs this peer from: a checkout's folder, where GitHub is out of reach",
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, min(options.seconds, 1.0)
    with machine("wrk") as here, here.upstream() as upstream:
        bench = Bench(here, upstream, options.seconds)
        if options.profile:
            bench.profile()
        else:
            measure_all(bench, options)


def measure_all(bench: Bench, options: argparse.Namespace) -> None:
    wanted = tuple(filter(None, options.only.lower().split(",")))
    proxies = everyone(install=not options.no_install, production_stack_at=options.production_stack)
    proxies = [one for one in proxies if not wanted or one.name.lower().startswith(wanted)]
    results: dict[str, list[Measured]] = {proxy.name: [] for proxy in proxies}
    direct: list[float] = []
    for done in range(1, options.rounds + 1):
        direct.append(bench.direct())
        for proxy in proxies:
            if proxy.missing or (proxy.slow and done > 1):
                continue
            try:
                results[proxy.name].append(bench.measure(proxy))
                print(done, proxy.name, results[proxy.name][-1], flush=True)
            except (DidNotStart, OSError) as error:
                print(proxy.name, error, file=sys.stderr)
        text = report(proxies, results, direct, f"Medians of {done} round(s), windows of {options.seconds:g} s.")
        if not options.quick and not wanted:  # after each round: an interrupted run leaves what it has
            page.write("measured", text)
            page.PLOT.write_text(drawing(results))
    print(text)


# How it is measured


@dataclass
class Bench:
    here: Machine
    upstream: int
    seconds: float

    def direct(self) -> float:
        """Requests a second without a proxy."""
        url = f"http://127.0.0.1:{self.upstream}{CHAT}"
        requests, _, _, seconds = self.window(url, CONNECTIONS, None, stream=False)
        return requests / seconds

    def measure(self, proxy: Proxy) -> Measured:
        port = free_port()
        command = proxy.command(port, self.upstream, self.here.folder)
        with self.here.running(command, self.here.proxy_core, port) as pid:
            url, got = f"http://127.0.0.1:{port}{proxy.path}", {}
            latency.warm(port, proxy.path)
            # Before a slow proxy has a backlog.
            with contextlib.suppress(OSError):
                added = latency.added(port, proxy.path, self.upstream, CHAT, self.seconds)
                got[LATENCY], got[FIRST] = added.answer, added.first_event
            requests, _, cpu, seconds = self.window(url, CONNECTIONS, pid, stream=False)
            if not requests:
                raise OSError("answers nothing under load")
            got["requests/s"], got[REQUEST] = requests / seconds, cpu / requests
            connections = SLOW_CONNECTIONS if proxy.slow else CONNECTIONS
            _, events, cpu, _ = self.window(url, connections, pid, max_tokens=EVENTS)
            if events > connections * EVENTS:  # else what it worked at was sent before the window
                got[BURST] = cpu / events
            _, events, cpu, seconds = self.window(url, PACED_STREAMS, pid, max_tokens=FOREVER, tick_us=TICK_US)
            got[PACED] = cpu / max(events, 1)
            got["pace"] = events / seconds / (PACED_STREAMS * 1e6 / TICK_US)
            with contextlib.suppress(OSError):
                got["KiB/idle stream"] = memory_of_streams(port, proxy.path, pid)
            return got

    def window(self, url: str, connections: int, pid: int | None, **body: object) -> tuple[int, int, float, float]:
        """What the upstream answered while it was running evenly: requests, events, CPU in µs, seconds."""
        load = self.load(url, connections, self.seconds + 2, **body)
        time.sleep(1)
        start, before, cpu = time.monotonic(), stats(self.upstream), cpu_of(pid) if pid else 0.0
        time.sleep(self.seconds)
        seconds, after, cpu = time.monotonic() - start, stats(self.upstream), (cpu_of(pid) if pid else 0.0) - cpu
        if re.search("Non-2xx|Socket errors", errors := load.communicate()[0]) and body.get("max_tokens") != FOREVER:
            print("!", errors, file=sys.stderr)
        return after["requests"] - before["requests"], after["events"] - before["events"], cpu, seconds

    def load(self, url: str, connections: int, seconds: float, **body: object) -> subprocess.Popen[str]:
        script = self.here.folder / "load.lua"
        text = chat(**{"stream": True, **body})
        script.write_text(f"wrk.method='POST' wrk.headers['Content-Type']='application/json' wrk.body=[[{text}]]")
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}", "-s", str(script), url]
        return subprocess.Popen(self.here.loading(*command), stdout=subprocess.PIPE, text=True)

    def profile(self) -> None:
        port, found = free_port(), str(self.here.folder / "profile")
        command = gateway("-c", PROFILED.format(found))(port, self.upstream, self.here.folder)
        url = f"http://127.0.0.1:{port}/m{CHAT}"
        with self.here.running(command, self.here.proxy_core, port):
            self.load(url, CONNECTIONS, self.seconds, stream=False).communicate()
            self.load(url, CONNECTIONS, self.seconds, max_tokens=EVENTS).communicate()
        pstats.Stats(found).sort_stats("tottime").print_stats(40)


def memory_of_streams(port: int, path: str, pid: int) -> float:
    """KiB (PSS) for each stream that is open, has had an event and waits for the next."""
    request, deadline = post(path, chat(stream=True, max_tokens=FOREVER, tick_us=HOUR_US)), time.monotonic() + OPENING
    time.sleep(1)
    before = memory(pid)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE_STREAMS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            client.sendall(request)
            got = b""
            while b"data:" not in got:
                if not (block := client.recv(65536)) or time.monotonic() > deadline:
                    raise OSError("a stream did not begin")
                got += block
        return (memory(pid) - before) / IDLE_STREAMS


# What is written


def report(proxies: list[Proxy], results: dict[str, list[Measured]], direct: list[float], how: str) -> str:
    found = medians(results)
    rows = [["direct", format(statistics.median(direct), COLUMNS["requests/s"]), *["–"] * (len(COLUMNS) - 1)]]
    for proxy in proxies:
        if got := found.get(proxy.name):
            rows.append([proxy.name, *(format(got[key], form) if key in got else "–" for key, form in COLUMNS.items())])
        else:
            rows.append([proxy.name, f"not measured: {proxy.missing or 'did not start'}", *[""] * (len(COLUMNS) - 1)])
    command = " ".join(["python benchmarks/forwarding.py", *sys.argv[1:]])
    late = [f"{name} ({got['pace']:.0%})" for name, got in found.items() if got["pace"] < 0.98]
    pace = "Did not keep the pace: " + ", ".join(late) if late else "All kept the pace of the paced streams"
    head = f"{description()}, {datetime.date.today()}; `{command}`. {how} A slow peer is in the first round only."
    titles = [key.replace("CPU µs/", "CPU/").removesuffix(", µs") for key in RATIOS]
    ratio_table = page.table(["gateway : peer", *titles], ratios(results))
    return "\n".join([head, "", page.table(["", *COLUMNS], rows), ratio_table, f"{pace}."])


def medians(results: dict[str, list[Measured]]) -> dict[str, Measured]:
    return {
        name: {
            key: statistics.median(one[key] for one in runs if key in one) for key in {k for one in runs for k in one}
        }
        for name, runs in results.items()
        if runs
    }


def ratios(results: dict[str, list[Measured]]) -> list[list[str]]:
    found = [name for name, runs in results.items() if runs]
    ours = [name for name in found if name.startswith(OWN)]
    return [
        [
            f"{our.removeprefix('fluidmcp run, ')} : {other}",
            *(ratio(results[our], results[other], key) for key in RATIOS),
        ]
        for our in ours
        for other in found
        if other not in ours
    ]


def ratio(ours: list[Measured], others: list[Measured], key: str) -> str:
    """Of what was measured in the same round: median, and smallest and largest."""
    found = sorted(
        one[key] / other[key] for one, other in zip(ours, others, strict=False) if key in one and other.get(key, 0) > 0
    )
    spread = f" ({found[0]:.2f}–{found[-1]:.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}" if found else "–"


def drawing(results: dict[str, list[Measured]]) -> str:
    found = medians(results)
    panels = {key: {name: got.get(key, 0.0) for name, got in found.items()} for key in PLOTTED}
    return plot.bars("CPU for each request and each event, by proxy", panels, own=OWN)


if __name__ == "__main__":
    main()
