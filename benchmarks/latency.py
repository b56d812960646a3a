"""What a proxy adds to the latency of one client: the same request to the server and through the proxy, by turns, so
that whatever else the machine does meets both alike. One connection each, nothing else under way."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from machine import chat, post

FEW_EVENTS, WARM, WARMING = 4, 20, 60.0


@dataclass(frozen=True)
class Added:
    """Microseconds, of the medians."""

    answer: float
    """To the end of an answer that comes in one piece."""
    first_event: float
    """To the first event of a stream."""


class Client:
    """A connection that is kept. An answer has a content-length or is chunked."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._whole = post(path, chat(stream=False))
        self._stream = post(path, chat(stream=True, max_tokens=FEW_EVENTS))

    def close(self) -> None:
        self._socket.close()

    def answer(self) -> float:
        began = time.perf_counter()
        self._socket.sendall(self._whole)
        got = self._receive(b"", lambda got: b"\r\n\r\n" in got)
        head, _, body = got.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise OSError(f"answered {head.splitlines()[0]!r}")
        if b"chunked" in head.lower():
            self._receive(body, lambda got: got.endswith(b"0\r\n\r\n"))
        else:
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            self._receive(body, lambda got: len(got) >= length)
        return (time.perf_counter() - began) * 1e6

    def first_event(self) -> float:
        began = time.perf_counter()
        self._socket.sendall(self._stream)
        got = self._receive(b"", lambda got: b"data:" in got)
        seconds = time.perf_counter() - began
        self._receive(got, lambda got: got.endswith(b"\r\n0\r\n\r\n"))
        return seconds * 1e6

    def _receive(self, got: bytes, enough: Callable[[bytes], bool]) -> bytes:
        while not enough(got):
            if not (block := self._socket.recv(65536)):
                raise OSError("the connection was closed inside an answer")
            got += block
        return got


def warm(port: int, path: str) -> None:
    """Ask until answers come: a proxy that listens may still be loading, or have to find its server."""
    deadline = time.monotonic() + WARMING
    while True:
        client = Client(port, path)
        try:
            for _ in range(WARM):
                client.answer()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        finally:
            client.close()


def added(port: int, path: str, upstream: int, upstream_path: str, seconds: float) -> Added:
    through, direct = Client(port, path), Client(upstream, upstream_path)
    try:
        return Added(
            _difference(through.answer, direct.answer, seconds / 2),
            _difference(through.first_event, direct.first_event, seconds / 2),
        )
    finally:
        through.close()
        direct.close()


def _difference(through: Callable[[], float], direct: Callable[[], float], seconds: float) -> float:
    pairs, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        pairs.append((through(), direct()))
    return statistics.median(pair[0] for pair in pairs) - statistics.median(pair[1] for pair in pairs)
