"""A client that leaves aborts its request at the model's server, before and after the first byte."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import remote
from tests.serving import DEADLINE, eventually, serving, stub


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """A server that nobody else leaves."""
    with stub() as port:
        yield port


@pytest.fixture(scope="module")
def gateway(upstream: int, server: str) -> Iterator[int]:
    with serving(remote(upstream), server) as port:
        yield port


def stats(port: int) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/stub/stats", trust_env=False, timeout=DEADLINE).json()
    return answer


@contextlib.contextmanager
def asking(port: int, **keys: Any) -> Iterator[socket.socket]:
    """A connection on which a request has been sent; leaving the block leaves the server."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **keys}).encode()
    head = f"POST /m/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(head + body)
        yield connection


@pytest.mark.parametrize("stream", [True, False])
def test_before_the_first_byte(gateway: int, upstream: int, stream: bool) -> None:
    before = stats(upstream)["aborted"]
    with asking(gateway, stream=stream, stub={"answer-delay": 600}):
        eventually(lambda: stats(upstream)["running"] == 1, "the request is inside")
    eventually(lambda: stats(upstream)["running"] == 0, "the request is gone")
    assert stats(upstream)["aborted"] == before + 1


def test_in_the_middle_of_a_stream(gateway: int, upstream: int) -> None:
    before = stats(upstream)["aborted"]
    with asking(gateway, stream=True, max_tokens=100_000, stub={"token-interval": 0.01}) as connection:
        received = b""
        while received.count(b"data:") < 3:
            received += connection.recv(65536)
        assert stats(upstream)["running"] == 1
    eventually(lambda: stats(upstream)["running"] == 0, "the request is gone")
    assert stats(upstream)["aborted"] == before + 1


def test_in_a_stream_that_is_silent(gateway: int, upstream: int) -> None:
    with asking(gateway, stream=True, max_tokens=100, stub={"hang-after": 2}) as connection:
        assert connection.recv(65536)
        eventually(lambda: stats(upstream)["running"] == 1, "the request is inside")
    eventually(lambda: stats(upstream)["running"] == 0, "the request is gone")


def test_during_an_upload(gateway: int, upstream: int) -> None:
    """Nothing of it stays, and the next request is answered."""
    head = b"POST /m/v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway), timeout=DEADLINE) as connection:
        connection.sendall(head + b"x" * 200_000)
        eventually(lambda: in_flight(gateway) == 1, "the upload is inside")
    eventually(lambda: in_flight(gateway) == 0, "the upload is gone")
    assert httpx.get(f"http://127.0.0.1:{gateway}/m/v1/models", timeout=DEADLINE).status_code == 200


def in_flight(port: int) -> int:
    count: int = httpx.get(f"http://127.0.0.1:{port}/models/m", timeout=DEADLINE).json()["in_flight"]
    return count


def test_a_slow_reader_slows_the_relay(upstream: int, server: str) -> None:
    """The relay takes no more of an answer than its client reads. That the transport below then pauses the server is
    tested with it."""
    size = 200_000_000
    gateway = remote(upstream)
    with serving(gateway, server) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(DEADLINE)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET /m/v1/bytes/{size} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(1000)
        assert gateway._fleet is not None
        scheduler = gateway._fleet.scheduler
        samples: list[int] = []

        def has_stopped() -> bool:
            samples.append(scheduler.progress("m"))
            return samples[-1] > 0 and len(samples) > 20 and len(set(samples[-20:])) == 1

        eventually(has_stopped, "no more is taken")
        assert 0 < samples[-1] < size / 4
        assert scheduler.in_flight("m") == 1
