"""Many paced streams at once: nothing lost, nothing late, also beside readers that hardly read."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from machine import CHAT, Machine, free_port, memory
from peers import gateway, nginx, nginx_version
from row import Row, Scale

STREAMS, SECONDS, TICK_US = 1000, 60, 20_000
LATEST_MS = 200.0
READERS, SLOWLY, LARGE = 50, 1024, 100_000_000
STREAMS_BESIDE, SECONDS_BESIDE = 256, 20
READERS_KIB, DISTURBED = 1024.0, 1.25

Seen = dict[str, Any]
"""What native/streams.c reports."""


def paced_streams(here: Machine, scale: Scale) -> list[Row]:
    count, seconds, path = STREAMS, scale.of(SECONDS), "/m" + CHAT
    with here.upstream() as upstream:
        beside = {"direct": read_streams(here, upstream, CHAT, count, seconds)}
        for name, command in {"gateway": gateway(), **({"nginx": nginx()} if nginx_version() else {})}.items():
            with here.running(command(port := free_port(), upstream, here.folder), here.proxy_core, port):
                beside[name] = read_streams(here, port, path, count, seconds)
    through = beside.pop("gateway")
    what = f"{count:,} streams of an event every {TICK_US // 1000} ms"
    others = [f"{name}: {completeness(seen)}" for name, seen in beside.items()]
    late = [f"{name}: {lateness(seen)}" for name, seen in beside.items()]
    whole = through["complete"] == count and not through["disordered"] + through["altered"]
    in_time = through["max_ms"] <= LATEST_MS
    return [
        Row(
            f"{what}, for {seconds} s: lost, reordered, altered",
            "none",
            completeness(through),
            "; ".join(others),
            whole,
        ),
        Row(f"{what}: latest event", f"{LATEST_MS:.0f} ms", lateness(through), "; ".join(late), in_time),
    ]


def slow_readers(here: Machine, scale: Scale) -> list[Row]:
    """The gateway holds back a server whose reader is slow, without holding what it would send, or anyone else."""
    seconds = scale.of(SECONDS_BESIDE)
    with (
        here.upstream() as upstream,
        here.running(gateway()(port := free_port(), upstream, here.folder), here.proxy_core, port) as pid,
    ):
        alone = read_streams(here, port, "/m" + CHAT, STREAMS_BESIDE, seconds)
        before = memory(pid)
        with reading_slowly(port, f"/m/v1/bytes/{LARGE}"):
            beside = read_streams(here, port, "/m" + CHAT, STREAMS_BESIDE, seconds)
            each = (memory(pid) - before) / READERS
    what = f"{READERS} readers of a {LARGE // 1_000_000} MB answer at 1 KB/s"
    in_time = beside["max_ms"] <= max(LATEST_MS, DISTURBED * alone["max_ms"])
    return [
        Row(f"{what}: memory for each", "1 MiB", f"{each:,.0f} KiB", "", each < READERS_KIB),
        Row(
            f"{what}: {STREAMS_BESIDE} paced streams beside them",
            f"{LATEST_MS:.0f} ms, or {DISTURBED} × without them",
            f"{completeness(beside)}; {lateness(beside)}",
            f"without the readers: {lateness(alone)}",
            in_time and beside["complete"] == STREAMS_BESIDE,
        ),
    ]


def read_streams(here: Machine, port: int, path: str, count: int, seconds: int) -> Seen:
    arguments = [str(port), path, str(count), str(seconds), str(TICK_US)]
    done = subprocess.run(
        here.loading("prlimit", "--nofile=8192", here.compiled("streams"), *arguments),
        stdout=subprocess.PIPE,
        check=False,
    )
    seen: Seen = json.loads(done.stdout)
    return seen


@contextlib.contextmanager
def reading_slowly(port: int, path: str) -> Iterator[None]:
    """Clients that take a kilobyte a second, with receive buffers so small that it shows; all have begun to read."""
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(READERS)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(30)
            client.connect(("127.0.0.1", port))
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            if not client.recv(SLOWLY).startswith(b"HTTP/1.1 200"):
                raise OSError("a slow reader got no answer")
        thread = threading.Thread(target=_read_on, args=(clients, over))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _read_on(clients: list[socket.socket], over: threading.Event) -> None:
    while not over.wait(1.0):
        for client in select.select(clients, [], [], 0)[0]:
            client.recv(SLOWLY)


def completeness(seen: Seen) -> str:
    faults = {"lost": seen["lost"], "reordered": seen["disordered"], "altered": seen["altered"]}
    found = ", ".join(f"{number:,} {name}" for name, number in faults.items() if number) or "none"
    cut = seen["streams"] - seen["complete"] - seen["unfinished"]
    more = {"streams wrong or cut": cut, "not over in time": seen["unfinished"]}
    return f"{found} of {seen['events']:,} events" + "".join(f", {n} {name}" for name, n in more.items() if n)


def lateness(seen: Seen) -> str:
    late = f", {seen['late']} streams later than {LATEST_MS:.0f} ms" if seen["late"] else ""
    return f"max {seen['max_ms']:,.0f} ms, p99.9 {seen['p999_ms']:,.1f}, p50 {seen['p50_ms']:,.1f}{late}"
