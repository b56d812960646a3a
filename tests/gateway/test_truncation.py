"""A truncated answer never looks finished, whatever stands between the gateway and the client.

Judged on the raw bytes: the last chunk of a chunked body (``0\\r\\n\\r\\n``) says "this was all", so it must be
missing.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.routing import Mount

from fluidmcp_proxy import Gateway, GatewayMiddleware
from tests.gateway.conftest import remote
from tests.serving import answers, raw_exchange, serving

LAST_CHUNK = b"0\r\n\r\n"
CHAT = "/m/v1/chat/completions"


def mounted(gateway: Gateway) -> Any:
    return Starlette(routes=[Mount("/", app=gateway)], lifespan=gateway.lifespan)


def behind_base_http_middleware(gateway: Gateway) -> Any:
    """FastAPI with two of the middlewares that swallow exceptions and end the body cleanly."""
    app = FastAPI(lifespan=gateway.lifespan)

    for _ in range(2):

        @app.middleware("http")
        async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    app.mount("/", gateway)
    return app


def as_middleware(gateway: Gateway) -> Any:
    return GatewayMiddleware(FastAPI(), gateway.config)


@pytest.fixture(scope="module", params=[lambda gateway: gateway, mounted, behind_base_http_middleware, as_middleware])
def port(request: pytest.FixtureRequest, upstream: int, server: str) -> Iterator[int]:
    with serving(request.param(remote(upstream)), server) as port:
        assert answers(port, "/m/v1/models")
        yield port


def ask(port: int, path: str = CHAT, headers: str = "", **knobs: Any) -> tuple[bytes, bytes, bool]:
    stub = {name.replace("_", "-"): value for name, value in knobs.items()}
    body = json.dumps(
        {"model": "m", "max_tokens": 20, "stream": True, "messages": [{"role": "user", "content": "hi"}], "stub": stub}
    ).encode()
    request = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    received, reset = raw_exchange(port, request.encode() + body)
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest, reset


def unchunked(body: bytes) -> bytes:
    """The data of a chunked body that may have been cut anywhere."""
    data = b""
    while body:
        size, separator, rest = body.partition(b"\r\n")
        if not separator or not int(size, 16):
            break
        data += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return data


def test_a_whole_stream_ends_cleanly(port: int) -> None:
    head, body, _ = ask(port)
    assert b" 200 " in head
    assert body.endswith(LAST_CHUNK)
    assert unchunked(body).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("cut_after", [1, 150, 700])
def test_a_cut_stream(port: int, cut_after: int, how: str) -> None:
    head, body, _ = ask(port, cut_after=cut_after, cut_how=how)
    assert b" 200 " in head
    assert not body.endswith(LAST_CHUNK)
    events = unchunked(body)
    *whole, last, empty = events.split(b"\n\n")
    assert empty == b""
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_disconnected"
    for event in whole:
        assert "choices" in json.loads(event.removeprefix(b"data: "))
    assert b"[DONE]" not in events


def test_anthropics_stream_gets_anthropics_event(port: int) -> None:
    _, body, _ = ask(port, "/m/v1/messages", cut_after=300)
    last = unchunked(body).rstrip(b"\n").rsplit(b"\n\n", 1)[-1]
    kind, data = last.split(b"\n")
    assert kind == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["type"] == "error"
    assert not body.endswith(LAST_CHUNK)


def test_a_compressed_stream_is_aborted_without_an_event(port: int) -> None:
    head, body, _ = ask(port, headers="x-stub-response-header: content-encoding: gzip\r\n", cut_after=300)
    assert b" 200 " in head
    assert not body.endswith(LAST_CHUNK)
    assert b"upstream_disconnected" not in body


def test_a_cut_body_with_a_length(port: int) -> None:
    request = b"GET /m/v1/bytes/5000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-stub-cut-after: 1000\r\n\r\n"
    received, _ = raw_exchange(port, request)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-length: 5000" in head.lower()
    assert len(body) < 5000


def test_a_cut_chunked_body(port: int) -> None:
    request = (
        b"GET /m/v1/bytes/5000?chunked=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-stub-cut-after: 1000\r\n\r\n"
    )
    received, _ = raw_exchange(port, request)
    assert b" 200 " in received
    assert not received.endswith(LAST_CHUNK)


def test_an_answer_that_is_no_http(port: int) -> None:
    head, body, _ = ask(port, garbage=True)
    assert b" 502 " in head
    assert b"x-should-retry: false" in head.lower()
    error = json.loads(body if body.startswith(b"{") else unchunked(body))["error"]
    assert error["code"] == "upstream_invalid_response"


def test_closed_before_the_first_byte(port: int) -> None:
    """``/v1/raw`` writes the request's body as the answer: here nothing at all."""
    head, body, _ = raw(port, b"")
    assert b" 502 " in head
    error = json.loads(body if body.startswith(b"{") else unchunked(body))["error"]
    assert error["code"] == "upstream_disconnected"


def raw(port: int, answer: bytes) -> tuple[bytes, bytes, bool]:
    request = f"POST /m/v1/raw HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(answer)}\r\n\r\n"
    received, reset = raw_exchange(port, request.encode() + answer)
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body, reset
