"""Bytes through the gateway, under every ASGI server: what goes in at one end comes out at the other."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import remote
from tests.gateway.recording import Recorder, recording
from tests.serving import DEADLINE, eventually, free_port, raw_exchange, serving


@pytest.fixture
def client(gateway: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{gateway}", timeout=DEADLINE, trust_env=False) as client:
        yield client


def stats(port: int) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/stub/stats", trust_env=False, timeout=DEADLINE).json()
    return answer


def chat(**keys: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "one two three"}], **keys}


def test_chat(client: httpx.Client, upstream: int) -> None:
    through = client.post("/m/v1/chat/completions", json=chat(max_tokens=3)).json()
    direct = httpx.post(
        f"http://127.0.0.1:{upstream}/v1/chat/completions", json=chat(max_tokens=3), timeout=DEADLINE
    ).json()
    assert through["choices"] == direct["choices"]
    assert through["usage"] == direct["usage"]


@pytest.mark.parametrize("token", [1, 2, 7])
def test_a_stream_arrives_token_by_token(client: httpx.Client, tmp_path: Path, token: int) -> None:
    """Each is here before the server makes the next."""
    go = tmp_path / "go"
    body = chat(max_tokens=9, stream=True, stub={"hang-after": token, "hang-until": str(go)})
    with client.stream("POST", "/m/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        chunks = answer.iter_raw()
        received = b""
        while received.count(b"data: ") < 1 + token:  # the first one has the role
            received += next(chunks)
        assert received.endswith(b"\n\n")
        go.touch()
        received += b"".join(chunks)
    assert received.endswith(b"data: [DONE]\n\n")
    assert received.count(b"data: ") == 12


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY"])
def test_any_method_and_target(client: httpx.Client, method: str) -> None:
    target = "/m/v1/echo?a=%2F..%20&b=/../x&&c=a+b;d"
    echo = client.request(method, target, content=b"\x00\xff body").json()
    assert (echo["method"], echo["target"]) == (method, target.removeprefix("/m"))
    assert base64.b64decode(echo["body"]["base64"]) == b"\x00\xff body"


def test_headers_cross_as_the_contract_says(client: httpx.Client, upstream: int) -> None:
    headers = [
        ("authorization", "Bearer the-client's"),
        ("x-custom", "1"),
        ("x-custom", "2"),
        ("x-forwarded-for", "6.6.6.6"),
        ("forwarded", "for=6.6.6.6"),
        ("x_custom", "underscore"),
        ("connection", "x-secret-hop"),
        ("x-secret-hop", "1"),
        ("te", "trailers"),
        ("x-request-id", "mine-1"),
        ("cookie", "a=b"),
    ]
    answer = client.get("/m/v1/echo", headers=headers)
    got = [(name.lower(), value) for name, value in answer.json()["headers"]]
    names = [name for name, _ in got]
    assert got.count(("x-custom", "1")) == got.count(("x-custom", "2")) == 1
    assert ("authorization", "Bearer the-client's") in got
    assert ("cookie", "a=b") in got
    assert ("host", f"127.0.0.1:{upstream}") in got
    assert ("x-forwarded-for", "127.0.0.1") in got
    assert ("x-forwarded-proto", "http") in got
    assert ("x-request-id", "mine-1") in got
    assert any(name == "via" for name in names)
    assert not {"x_custom", "x-secret-hop", "te", "forwarded"} & set(names)
    assert answer.headers["x-request-id"] == "mine-1"


def test_the_answer_is_the_servers_own(client: httpx.Client) -> None:
    headers = [
        ("x-stub-response-header", "set-cookie: a=1"),
        ("x-stub-response-header", "set-cookie: b=2"),
        ("x-stub-response-header", "x-request-id: the-server's"),
    ]
    first = client.get("/m/v1/status/418", headers=headers)
    assert first.status_code == 418
    assert first.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert re.fullmatch(r"[0-9a-f]{32}", first.headers["x-request-id"])
    client.cookies.clear()
    # httpx's own client would replay the cookie
    echo = client.get("/m/v1/echo").json()
    assert "cookie" not in {name.lower() for name, _ in echo["headers"]}


@pytest.mark.parametrize("status", [204, 304, 301, 400, 401, 404, 422, 429, 500, 503])
def test_statuses_pass_unchanged(client: httpx.Client, status: int) -> None:
    assert client.get(f"/m/v1/status/{status}").status_code == status


def test_a_wrong_model_gets_the_servers_404(client: httpx.Client, upstream: int) -> None:
    body = {**chat(), "model": "wrong"}
    through = client.post("/m/v1/chat/completions", json=body)
    direct = httpx.post(f"http://127.0.0.1:{upstream}/v1/chat/completions", json=body, timeout=DEADLINE)
    assert (through.status_code, through.content) == (direct.status_code, direct.content)
    assert through.status_code == 404


def test_head(client: httpx.Client) -> None:
    answer = client.head("/m/v1/bytes/1000")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "1000", b"")


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3_000_000])
def test_bodies_of_every_size_both_ways(client: httpx.Client, size: int) -> None:
    data = random.Random(size).randbytes(size)
    echo = client.post("/m/v1/echo", content=data).json()
    assert echo["body"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert client.post("/m/v1/replay", content=data).content == data


def test_an_upload_of_unknown_length(client: httpx.Client) -> None:
    data = [bytes([number]) * 50_000 for number in range(10)]
    echo = client.post("/m/v1/echo", content=iter(data)).json()
    assert echo["body"]["sha256"] == hashlib.sha256(b"".join(data)).hexdigest()


def test_nothing_is_decompressed(client: httpx.Client) -> None:
    headers = {"x-stub-response-header": "content-encoding: gzip", "accept-encoding": "gzip"}
    with client.stream("GET", "/m/v1/bytes/100", headers=headers) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert len(b"".join(answer.iter_raw())) == 100


@pytest.mark.parametrize("path", ["/health", "/ready", "/models", "/models/m"])
def test_pages(client: httpx.Client, path: str) -> None:
    eventually(lambda: client.get("/ready").status_code == 200, "the probe saw the server")
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    head = client.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(answer.content)))


def test_the_state_of_a_model(client: httpx.Client) -> None:
    eventually(lambda: client.get("/ready").status_code == 200, "the probe saw the server")
    # Who left a moment ago may be inside still.
    status = eventually(lambda: (told := client.get("/models/m").json())["in_flight"] == 0 and told, "nobody is inside")
    assert (status["id"], status["state"], status["in_flight"], status["queued"]) == ("m", "ready", 0, 0)


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@pytest.fixture(scope="module")
def strict(recorder: Recorder, server: str) -> Iterator[int]:
    """A gateway whose model's server writes down what reaches it."""
    with serving(remote(recorder.port), server) as port:
        yield port


@pytest.mark.parametrize(
    ("request_line", "status", "code"),
    [
        ("GET /m/v1/%2e%2e/health", 400, "invalid_path"),
        ("GET /m/v1/..%2fhealth", 400, "invalid_path"),
        ("GET /m/v1//models", 400, "invalid_path"),
        ("GET /nobody/v1/models", 404, "model_not_found"),
        ("GET /nothing", 404, "path_not_found"),
        ("GET /m/v1/load_lora_adapter", 404, "path_not_found"),
        ("PUT /health", 405, "method_not_allowed"),
        ("GET /m/mcp", 410, "mcp_endpoint_removed"),
        ("GET /m/v1/" + "a" * 20000, 414, "uri_too_long"),
    ],
)
def test_refusals(strict: int, recorder: Recorder, request_line: str, status: int, code: str) -> None:
    request = f"{request_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received, _ = raw_exchange(strict, request.encode())
    head, _, body = received.partition(b"\r\n\r\n")
    assert int(head.split(b" ")[1]) == status
    error = json.loads(body)["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert b"x-request-id" in head.lower()
    assert recorder.take() == [], "it has reached the model's server"


def test_a_body_over_the_limit(upstream: int, server: str) -> None:
    gateway = remote(upstream)
    gateway.config.settings.__dict__["max_body_bytes"] = 100_000
    with (
        serving(gateway, server) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client,
    ):
        assert client.post("/m/v1/echo", content=b"x" * 100_000).status_code == 200
        declared = client.post("/m/v1/echo", content=b"x" * 100_001)
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "request_too_large")
        undeclared = client.post("/m/v1/echo", content=iter([b"x" * 60_000] * 2))
        assert undeclared.status_code == 413
        assert client.get("/m/v1/models").status_code == 200


def test_anthropic_errors_have_anthropics_form(upstream: int) -> None:
    with serving(remote(free_port())) as port:
        answer = httpx.post(f"http://127.0.0.1:{port}/m/v1/messages", json={}, timeout=DEADLINE)
    assert answer.status_code == 503
    assert answer.json() == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": answer.json()["error"]["message"]},
    }
