"""What the unified `/v1` costs beside `/{model}/v1`: CPU of one `fluidmcp run`, the two routes in turn, in one run.

`python benchmarks/unified.py` prints a table; `--rounds N` and `--seconds S` (of each window) make it longer. The
gateway has the last core to itself, upstream and load share the first. CPU is the time that the kernel says the
gateway's threads have run (`/proc/PID/task/*/schedstat`). Small requests are as the OpenAI SDK sends one question,
by the model's alias, so that its name is replaced; the large ones are 20 MB with an image, `model` first or last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONNECTIONS = 8
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer with one sentence."}]
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:," + "A" * 20_000_000}}]}]
TALK = [{"role": role, "content": "Tell me more, please. " * 20} for role in ("user", "assistant")] * 20
BODIES: dict[str, dict[str, object]] = {
    "small": {"messages": QUESTION, "model": "MODEL", "temperature": 0.3, "max_tokens": 200},
    "40 messages, 20 KB": {"messages": TALK, "model": "MODEL", "temperature": 0.3, "stream": True},
    "20 MB, model first": {"model": "MODEL", "messages": IMAGE},
    "20 MB, model last": {"messages": IMAGE, "model": "MODEL"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window of measurement")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(upstream(options.serve))
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    rows = ["| body | CPU by prefix | CPU unified | more |", "|---|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder), cores[-1]) as (port, pid):
        for name, document in BODIES.items():
            costs = {route: measured(port, pid, route, document) for route in ("/m/v1", "/v1")}
            values: dict[str, list[float]] = {route: [] for route in costs}
            for _ in range(options.rounds):
                for route, cost in costs.items():
                    values[route].append(cost(options.seconds))
            more = [b - a for a, b in zip(*values.values(), strict=True)]
            cells = [*(statistics.median(one) for one in values.values()), statistics.median(more)]
            rows.append(f"| {name} | {' | '.join(f'{cell * 1e6:,.1f} µs' for cell in cells)} |")
            print(rows[-1], [round(one * 1e6, 1) for one in more], flush=True)
    print(
        f"\n{platform.machine()}, {len(cores)} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    print("\n".join(rows))


def measured(port: int, pid: int, route: str, document: dict[str, object]) -> Callable[[float], float]:
    body = json.dumps(document).replace('"MODEL"', '"served"' if route == "/m/v1" else '"alias"').encode()
    head = f"POST {route}/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def cost(seconds: float) -> float:
        """CPU seconds of a request."""
        asyncio.run(load(port, request, min(0.3, seconds)))
        before = cpu(pid)
        done = asyncio.run(load(port, request, seconds))
        return (cpu(pid) - before) / done

    return cost


async def load(port: int, request: bytes, seconds: float) -> int:
    """Requests answered in that time, on a few connections."""
    end, done = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(2)
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS if len(request) < 1_000_000 else 1)))
    return done


def cpu(pid: int) -> float:
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@contextlib.contextmanager
def gateway(folder: Path, core: int) -> Iterator[tuple[int, int]]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, server = one.getsockname()[1], two.getsockname()[1]
    other = {"endpoints": {"base_url": f"http://127.0.0.1:{server}/other/v1"}}
    model = {"endpoints": {"base_url": f"http://127.0.0.1:{server}/v1"}, "aliases": ["alias"]}
    (folder / "models.json").write_text(json.dumps({"llmModels": {"m": model, "other": other}}))
    run = [sys.executable, "-m", "fluidmcp_proxy", "run", str(folder / "models.json"), "--port", str(port)]
    with contextlib.ExitStack() as stack:
        for command in ([sys.executable, __file__, "--serve", str(server)], ["taskset", "-c", str(core), *run]):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            listening = server if command[-1] == str(server) else port
            for _ in range(400):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listening), 1):
                    break
                time.sleep(0.05)
        time.sleep(2)  # the servers' names are asked for
        yield port, process.pid


async def upstream(port: int) -> None:
    """Reads requests and answers `{}`; lists one model."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                left = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
                while left:
                    left -= len(await reader.read(min(left, 1 << 18)))
                name = b"other" if b"get /other" in head else b"served"
                listing = b'{"data": [{"id": "%b"}]}' % name
                length = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(listing)
                writer.write(length + listing if head.startswith(b"get") else ANSWER)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 18) as server:
        await server.serve_forever()


if __name__ == "__main__":
    main()
