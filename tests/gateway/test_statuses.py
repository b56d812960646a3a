"""Errors that need a special server, client or configuration; each with its exact status, code and headers."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.gateway.access import MAX_HEADER_BYTES, MAX_HEADERS
from tests.gateway.conftest import remote
from tests.serving import DEADLINE, free_port, serving

Headers = list[tuple[bytes, bytes]]


async def ask(gateway: Gateway, headers: Headers, method: str = "POST", **keys: Any) -> tuple[int, dict[str, str], Any]:
    """One request as a server that checks nothing would hand it over."""
    scope = {
        "type": "http",
        "method": method,
        "path": "/m/v1/echo",
        "raw_path": b"/m/v1/echo",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        **keys,
    }
    said: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("a request that is refused is not read")

    async def send(message: MutableMapping[str, Any]) -> None:
        said.append(message)

    async with gateway.run():
        await gateway(scope, receive, send)
    answer = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return said[0]["status"], answer, json.loads(b"".join(message.get("body", b"") for message in said))


HOST = (b"host", b"localhost:8099")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ([], 400, "invalid_host"),
        ([HOST, HOST], 400, "invalid_host"),
        ([(b"host", b"a b")], 400, "invalid_host"),
        ([(b"host", b"")], 400, "invalid_host"),
        ([(b"host", b"user@host")], 400, "invalid_host"),
        ([(b"host", b"a/b")], 400, "invalid_host"),
        ([HOST, (b"content-length", b"1"), (b"content-length", b"2")], 400, "invalid_target"),
        ([HOST, (b"content-length", b"1"), (b"transfer-encoding", b"chunked")], 400, "invalid_target"),
        ([HOST, (b"content-length", b"-1")], 400, "invalid_target"),
        ([HOST, (b"content-length", b"1, 1")], 400, "invalid_target"),
        ([HOST, (b"content-length", b"9" * 5000)], 400, "invalid_target"),
        ([HOST, (b"content-length", b"5"), (b"upgrade", b"h2c")], 400, "invalid_target"),
        ([HOST, (b"transfer-encoding", b"chunked"), (b"upgrade", b"h2c")], 400, "invalid_target"),
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], 400, "invalid_target"),
        ([HOST, (b"content-length", b"99999999999")], 413, "request_too_large"),
        ([HOST, *[(b"x", b"")] * MAX_HEADERS], 431, "headers_too_large"),
        ([HOST, (b"x", b"x" * MAX_HEADER_BYTES)], 431, "headers_too_large"),
    ],
)
async def test_headers_that_no_server_should_let_through(headers: Headers, status: int, code: str) -> None:
    got, answer, body = await ask(remote(free_port()), headers)
    assert (got, body["error"]["code"]) == (status, code)
    assert answer["content-type"] == "application/json"
    assert answer["x-request-id"]


@pytest.mark.anyio
@pytest.mark.parametrize("host", [b"localhost", b"127.0.0.1:80", b"[::1]:8099", b"a_b.example", b"x:"])
async def test_good_hosts(host: bytes) -> None:
    got, _, body = await ask(remote(free_port()), [(b"host", host), (b"content-length", b"99999999999")])
    assert (got, body["error"]["code"]) == (413, "request_too_large")


def test_a_server_that_is_not_there() -> None:
    with TestClient(remote(free_port())) as client:
        answer = client.get("/m/v1/models")
        assert client.get("/ready").status_code == 503
        assert client.get("/models/m").json()["state"] == "starting"
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
    assert answer.json()["error"]["type"] == "upstream_error"
    assert answer.headers["retry-after"] == "2"


def test_the_first_byte_comes_too_late(upstream: int) -> None:
    with TestClient(remote(upstream, first_byte_timeout=0.1)) as client:
        body = {"model": "m", "messages": [], "stub": {"answer-delay": 600}}
        answer = client.post("/m/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    assert answer.headers["x-should-retry"] == "false"


def test_a_stream_that_falls_silent(upstream: int) -> None:
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 10, "stub": {"hang-after": 2}}
    seen: deque[str] = deque()
    with serving(remote(upstream, stream_idle_timeout=0.2)) as port:
        url = f"http://127.0.0.1:{port}/m/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=DEADLINE) as answer, pytest.raises(httpx.TransportError):
            seen.extend(filter(None, answer.iter_lines()))
    assert json.loads(seen[-1].removeprefix("data: "))["error"]["code"] == "upstream_timeout"


def test_the_models_key_replaces_the_clients(upstream: int) -> None:
    with TestClient(remote(upstream, api_key="sk-upstream")) as client:
        echo = client.get("/m/v1/echo", headers={"authorization": "Bearer the-client's"}).json()
    assert [value for name, value in echo["headers"] if name.lower() == "authorization"] == ["Bearer sk-upstream"]


@pytest.mark.anyio
@pytest.mark.parametrize("version", ["0.9", "1.2", "2.0", ""])
async def test_versions_that_there_are_not(version: str) -> None:
    got, _, body = await ask(remote(free_port()), [HOST], http_version=version)
    assert (got, body["error"]["code"]) == (400, "invalid_target")
