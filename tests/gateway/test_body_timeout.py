"""A client that falls silent inside its body: 408, and nothing of its request stays."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.errors import RequestTimeout
from fluidmcp_proxy.gateway.body import RequestBody
from tests.models.virtual_time import BACKEND
from tests.serving import DEADLINE, eventually, serving

PATIENCE = 0.3


@pytest.fixture(scope="module")
def port(upstream: int, server: str) -> Iterator[int]:
    """A gateway that waits a third of a second for more of a body."""
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}
    document = {"llmModels": {"m": entry}, "gateway": {"body_timeout": PATIENCE}}
    with serving(Gateway(parse_config(document, environ={})), server) as port:
        yield port


def in_flight(port: int) -> int:
    count: int = httpx.get(f"http://127.0.0.1:{port}/models/m", trust_env=False, timeout=DEADLINE).json()["in_flight"]
    return count


@pytest.mark.parametrize("target", ["/m/v1/echo", "/v1/echo"])
@pytest.mark.parametrize(
    "framing", ["Content-Length: 1000000\r\n\r\n{}", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"]
)
@pytest.mark.parametrize("size", [0, 200_000], ids=["before it is forwarded", "while it is forwarded"])
def test_silence(port: int, framing: str, size: int, target: str) -> None:
    sent = framing.encode()
    if size and "chunked" in framing:
        sent += b"%x\r\n%b\r\n" % (size, b" " * size)
    elif size:
        sent += b" " * size
    if target == "/v1/echo":
        sent = sent.replace(b"{}", b"{\n")  # no name yet: it is looked for
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\n".encode() + sent)
        received = b""
        while data := connection.recv(65536):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert b"request_timeout" in body
    eventually(lambda: in_flight(port) == 0, "its place is free")


class Slow:
    """A client that sends a piece now and then, and never the last one if it ``stops`` before."""

    def __init__(self, pieces: int, pause: float, *, stops: bool = False) -> None:
        self.left, self.pause, self.stops = pieces, pause, stops

    async def receive(self) -> dict[str, Any]:
        self.left -= 1
        await anyio.sleep(600 if self.stops and not self.left else self.pause)
        return {"type": "http.request", "body": b"x" * 30_000, "more_body": self.left > 0}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [BACKEND])
@pytest.mark.parametrize("pieces", [2, 10], ids=["collected", "streamed"])
async def test_a_slow_body_that_keeps_coming_is_no_silence(pieces: int) -> None:
    """Whole in more time than the limit, never silent for as long."""
    chunked = [(b"transfer-encoding", b"chunked")]
    began = anyio.current_time()
    body = RequestBody(Slow(pieces, 50).receive, chunked, 1_000_000, 60)
    assert len(await all_of(await body.start())) == pieces * 30_000
    assert anyio.current_time() - began == pytest.approx(pieces * 50)
    body = RequestBody(Slow(pieces, 50, stops=True).receive, chunked, 1_000_000, 60)
    with pytest.raises(RequestTimeout):
        await all_of(await body.start())
    assert anyio.current_time() - began == pytest.approx((2 * pieces - 1) * 50 + 60)


async def all_of(content: bytes | AsyncIterator[bytes] | None) -> bytes:
    assert content is not None
    return content if isinstance(content, bytes) else b"".join([piece async for piece in content])
