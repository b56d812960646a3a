"""What is known of a request when it is over, however it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway.record import RequestRecord, log_request
from fluidmcp_proxy.gateway.relay import AnswerTruncated
from tests.gateway.conftest import remote
from tests.gateway.records import Records
from tests.serving import DEADLINE, eventually, free_port, raw_exchange, serving

CHAT = "/m/v1/chat/completions"
SECRET = "canary-4711"


@pytest.fixture(scope="module")
def records() -> Records:
    """Each test takes all that it makes."""
    return Records()


@pytest.fixture(scope="module")
def port(upstream: int, records: Records) -> Iterator[int]:
    with serving(remote(upstream, max_concurrency=1, report=records)) as port:
        yield port


def chat(**keys: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": SECRET}], **keys}).encode()


def post(port: int, path: str = CHAT, **keys: Any) -> httpx.Response:
    return httpx.post(
        f"http://127.0.0.1:{port}{path}", content=chat(**keys), headers={"x-request-id": "r-1"}, timeout=DEADLINE
    )


@pytest.mark.parametrize("path", [CHAT, f"{CHAT}?token={SECRET}", "/v1/chat/completions"])
def test_complete(port: int, records: Records, tmp_path: Path, path: str) -> None:
    with (
        httpx.Client(timeout=DEADLINE, headers={"x-request-id": "r-1"}) as client,
        client.stream(
            "POST",
            f"http://127.0.0.1:{port}{path}",
            content=chat(stream=True, max_tokens=5, stub={"hang-after": 2, "hang-until": str(tmp_path / "go")}),
        ) as answer,
    ):
        chunks = answer.iter_raw()
        received = next(chunks)
        (tmp_path / "go").touch()  # so that not all of it comes at once
        received += b"".join(chunks)
    record = records.next()
    assert record[:6] == ("r-1", "POST", "/v1/chat/completions", "m", 200, len(received))
    assert record.outcome == "complete"
    assert 1 < record.chunks <= received.count(b"data:")
    assert record.ttfb is not None
    assert record.queue is not None
    assert 0 <= record.queue < record.ttfb < record.seconds
    assert SECRET not in str(record)


def test_without_a_body(port: int, records: Records) -> None:
    assert httpx.head(f"http://127.0.0.1:{port}/m/v1/bytes/7", timeout=DEADLINE).status_code == 200
    record = records.next()
    assert (record.bytes, record.chunks, record.ttfb, record.outcome) == (0, 0, None, "complete")


@pytest.mark.parametrize(
    ("method", "path", "content", "expected"),
    [
        ("GET", "/nowhere", b"", ("-", "-", 404, "path_not_found")),
        ("GET", f"/{SECRET}/v1/models", b"", ("-", "-", 404, "model_not_found")),
        ("POST", "/v1/embeddings", b"[", ("/v1/embeddings", "-", 400, "invalid_json")),
    ],
)
def test_refused(
    port: int, records: Records, method: str, path: str, content: bytes, expected: tuple[str, str, int, str]
) -> None:
    httpx.request(method, f"http://127.0.0.1:{port}{path}", content=content, timeout=DEADLINE)
    record = records.next()
    assert (record.route, record.model, record.status, record.code) == expected
    assert (record.outcome, record.ttfb, record.queue) == ("refused", None, None)
    assert SECRET not in str(record)


def test_the_upstreams_own_error_is_an_answer(port: int, records: Records) -> None:
    post(port, stub={"status": 500})
    record = records.next()
    assert (record.status, record.outcome, record.code) == (500, "complete", "-")


def test_the_time_in_the_queue(port: int, records: Records) -> None:
    """The only place is taken until its client leaves; a second client's patience ends first."""
    with leaving(port, stub={"hang": True}) as connection:
        state = f"http://127.0.0.1:{port}/models/m"
        eventually(lambda: httpx.get(state, timeout=DEADLINE).json()["in_flight"] == 1, "the place is taken")
        wait = {"prefer": "wait=1"}
        refused = httpx.post(f"http://127.0.0.1:{port}{CHAT}", content=chat(), headers=wait, timeout=DEADLINE)
        record = records.next()
        assert (refused.status_code, record.status, record.code) == (503, 503, "queue_timeout")
        assert record.queue is not None
        assert 0.9 < record.queue <= record.seconds
        connection.close()
    assert records.next().outcome == "client_left"


def leaving(port: int, **keys: Any) -> socket.socket:
    body = chat(**keys)
    connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_leaves_before_the_first_byte(port: int, records: Records) -> None:
    leaving(port, stub={"hang": True}).close()
    record = records.next()
    assert (record.model, record.status, record.bytes, record.outcome) == ("m", None, 0, "client_left")


def test_a_client_that_leaves_inside_a_stream(port: int, records: Records) -> None:
    with leaving(port, stream=True, max_tokens=100_000, stub={"token-interval": 0.01}) as connection:
        received = b""
        while b"data:" not in received:
            received += connection.recv(65536)
    record = records.next()
    assert (record.status, record.outcome) == (200, "client_left")
    assert record.bytes > 0
    assert record.ttfb is not None


def test_a_client_that_leaves_inside_its_body(port: int, records: Records) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
    record = records.next()
    assert (record.status, record.outcome) == (None, "client_left")


def test_a_server_that_dies_before_the_first_byte(port: int, records: Records) -> None:
    httpx.post(f"http://127.0.0.1:{port}/m/v1/raw", content=b"", timeout=DEADLINE)
    record = records.next()
    assert (record.status, record.outcome, record.code) == (502, "upstream_died", "upstream_disconnected")


def test_a_server_that_dies_inside_a_stream(port: int, records: Records) -> None:
    body = chat(stream=True, max_tokens=20, stub={"cut-after": 700})
    request = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    raw_exchange(port, request)
    record = records.next()
    assert (record.status, record.outcome) == (200, "upstream_died")
    assert 0 < record.bytes <= 700


def test_a_server_that_is_not_there() -> None:
    records = Records()
    with serving(remote(free_port(), report=records)) as port:
        post(port)
    record = records.next()
    assert (record.status, record.outcome, record.code) == (503, "upstream_died", "upstream_unavailable")


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["gateway ends", "server cancels"])
async def test_a_stream_that_is_cut(upstream: int, how: str) -> None:
    models, records = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}}, Records()
    config = parse_config({"llmModels": models, "gateway": {"drain_timeout": 0}}, environ={})
    gateway = Gateway(config, report=records)
    begun = anyio.Event()
    body = [chat(stream=True, max_tokens=100_000, stub={"token-interval": 0.01})]

    async def receive() -> dict[str, Any]:
        if not body:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": body.pop(), "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            begun.set()

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"host", b"x")]}
        with contextlib.suppress(AnswerTruncated):
            await gateway(scope, receive, send)

    with anyio.fail_after(DEADLINE):
        async with gateway.run(), anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await begun.wait()
            gateway.begin_shutdown() if how == "gateway ends" else tasks.cancel_scope.cancel()
    (record,) = records.seen
    assert (record.status, record.outcome) == (200, "cut")


def test_what_the_gateway_answers_itself_has_no_line(port: int, records: Records) -> None:
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE).status_code == 200
    assert post(port).status_code == 200
    assert records.next().route == "/v1/chat/completions"


def test_as_a_line(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord("id", "GET", "other", "m", None, 1, 2, 0.5, None, 0.25, "client_left", "-", "-")
    line = "id GET other model=m status=- bytes=1 chunks=2 seconds=0.500 ttfb=- queue=0.250 outcome=client_left"
    assert str(record) == f"{line} code=- key=-"
    caplog.set_level(logging.INFO, "fluidmcp_proxy.access")
    log_request(record)
    assert record in [logged.msg for logged in caplog.records]
    assert f"{line} code=- key=-" in caplog.messages
