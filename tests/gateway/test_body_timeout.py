"""A client that falls silent inside its body: 408, and nothing of its request stays."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
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
    count: int = httpx.get(f"http://127.0.0.1:{port}/models/m", trust_env=False).json()["in_flight"]
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


def test_a_slow_body_that_keeps_coming_is_no_silence(port: int) -> None:
    """Whole in more time than the limit, never silent for half as long."""
    body = json.dumps({"model": "m", "messages": []}).encode()
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        head = f"POST /m/v1/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        for byte in body:
            connection.sendall(bytes([byte]))
            time.sleep(1.5 * PATIENCE / len(body))
        received = b""
        while data := connection.recv(65536):
            received += data
    assert time.monotonic() - began > PATIENCE
    assert received.startswith(b"HTTP/1.1 200 ")
