"""How much memory the gateway needs: for a stream that is open, and for a large request body on its way."""

from __future__ import annotations

import concurrent.futures
import json
import random
import urllib.request

from forwarding import IDLE_STREAMS, memory_of_streams
from machine import CHAT, Machine, free_port, peak, reset_peak
from peers import gateway
from row import Row, Scale

STREAM_KIB, BODY_KIB = 60.0, 2048.0
UPLOADS, SIZE, PAUSE_US = 8, 20_000_000, 2_000_000


def open_streams(here: Machine, _scale: Scale) -> list[Row]:
    with (
        here.upstream() as upstream,
        here.running(gateway()(port := free_port(), upstream, here.folder), here.proxy_core, port) as pid,
    ):
        each = memory_of_streams(port, "/m" + CHAT, pid)
    what = f"{IDLE_STREAMS:,} idle streams: memory for each"
    return [Row(what, f"{STREAM_KIB:.0f} KiB", f"{each:.1f} KiB", "", each <= STREAM_KIB)]


def large_bodies(here: Machine, _scale: Scale) -> list[Row]:
    """Several at once, before a server that begins to read late: the gateway has to hold the clients back."""
    body = random.Random(1).randbytes(SIZE)
    with (
        here.upstream() as upstream,
        here.running(gateway()(port := free_port(), upstream, here.folder), here.proxy_core, port) as pid,
        concurrent.futures.ThreadPoolExecutor(UPLOADS) as pool,
    ):
        expected = upload(upstream, "/v1/files", body)
        upload(port, "/m/v1/files", b"x" * 100_000)  # what is imported and allocated once
        reset_peak(pid)
        before = peak(pid)
        answers = [*pool.map(lambda _: upload(port, "/m/v1/files", body), range(UPLOADS))]
        each = (peak(pid) - before) / UPLOADS
    whole = answers.count(expected)
    what = (
        f"{UPLOADS} bodies of {SIZE // 1_000_000} MB at once before a server that reads after {PAUSE_US // 1_000_000} s"
    )
    met = whole == UPLOADS and each < BODY_KIB
    return [Row(f"{what}: peak memory for each", "2 MiB", f"{each:,.0f} KiB; {whole} of {UPLOADS} whole", "", met)]


def upload(port: int, path: str, body: bytes) -> dict[str, object]:
    """What the server says that it received."""
    headers = {"Content-Type": "application/octet-stream", "x-pause-us": str(PAUSE_US)}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        received: dict[str, object] = json.load(answer)
        return received
