"""The unified ``/v1`` under every ASGI server: the right model, its own name, every other byte as it was."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.errors import AmbiguousModel, GatewayError
from fluidmcp_proxy.gateway.body import RequestBody
from fluidmcp_proxy.gateway.unified import choose_model, model_in_query
from fluidmcp_proxy.models.catalog import Catalog
from tests.gateway.test_forwarding import stats
from tests.models.test_catalog import TWO, catalog
from tests.serving import DEADLINE, STUB, eventually, free_port, raw_exchange, serving, stub


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[int, int]]:
    with (
        stub("--served-model-name", "org/one", "--lora-modules", "adapter=/x") as one,
        stub("--served-model-name", "two", "both") as two,
    ):
        yield one, two


@pytest.fixture(scope="module")
def port(servers: tuple[int, int], server: str) -> Iterator[int]:
    def entry(port: int, **keys: Any) -> dict[str, Any]:
        return {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}, **keys}

    models = {
        "one": entry(servers[0], aliases=["an/alias"]),
        "two": entry(servers[1], extra_paths=["/v1/load_lora_adapter"]),
        "away": entry(free_port()),
    }
    with serving(Gateway(parse_config({"llmModels": models}, environ={})), server) as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE, trust_env=False) as client:
        yield client


def received(answer: httpx.Response) -> tuple[bytes, dict[str, str]]:
    """The body and the headers that ``/v1/echo`` got."""
    echo = answer.json()
    return base64.b64decode(echo["body"]["base64"]), {name.lower(): value for name, value in echo["headers"]}


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    ("name", "served"),
    [("one", "org/one"), ("an/alias", "org/one"), ("org/one", "org/one"), ("adapter", "adapter"), ("two", "two"),
     ("both", "both")],
)  # fmt: skip
def test_every_kind_of_name(client: httpx.Client, name: str, served: str) -> None:
    body = {"messages": [{"role": "user", "content": 'the "model": "x"'}], "model": name, "stream": True}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n")
    got, headers = received(client.post("/v1/echo", json=body))
    assert json.loads(got) == {**body, "model": served}
    assert got == httpx.Request("POST", "http://x", json={**body, "model": served}).read()
    assert headers["content-length"] == str(len(got))


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
def test_a_large_body(client: httpx.Client, first: bool, chunked: bool) -> None:
    image = base64.b64encode(hashlib.sha256(b"seed").digest() * 40_000).decode()
    model, image_key = '"model" :\t"\\u006fne"', f'"image": "{image}"'
    text = "{" + ", ".join([model, image_key] if first else [image_key, model]) + "} "
    body = text.encode()
    content: Any = (body[at : at + 70_000] for at in range(0, len(body), 70_000)) if chunked else body
    answer = client.post("/v1/echo", content=content)
    assert answer.json()["body"]["sha256"] == hashlib.sha256(body.replace(rb"\u006fne", b"org/one")).hexdigest()


@pytest.mark.parametrize("size", [10, 300_000])
def test_audio(client: httpx.Client, size: int) -> None:
    files: dict[str, Any] = {
        "file": ("a.wav", b"\r\n--\x00" * (size // 5), "audio/wav"),
        "model": (None, "one"),
        "language": (None, "en"),
    }
    request = client.build_request("POST", "/v1/echo", files=files)
    sent = request.read()
    echo = client.send(request).json()
    expected = sent.replace(b"\r\n\r\none\r\n", b"\r\n\r\norg/one\r\n")
    assert len(expected) == len(sent) + 4
    assert echo["body"]["sha256"] == hashlib.sha256(expected).hexdigest()


def test_without_a_body(client: httpx.Client) -> None:
    for target in ("/v1/echo?model=two&x=%20", "/v1/echo?a&model=an%2Falias"):
        assert client.get(target).json()["target"] == target
    assert client.delete("/v1/echo?model=adapter").json()["method"] == "DELETE"
    assert refused(client.get("/v1/echo")) == (400, "model_required")
    assert refused(client.post("/v1/echo")) == (400, "model_required")
    assert refused(client.get("/v1/echo?model=two&model=one")) == (400, "ambiguous_model")


def test_bodies_that_cannot_be_read(client: httpx.Client) -> None:
    coded = gzip.compress(b'{"model": "one"}')
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    answer = client.post("/v1/echo", content=coded, headers=headers)
    assert refused(answer) == (400, "model_required")
    assert "content coding" in answer.json()["error"]["message"]
    assert received(client.post("/v1/echo?model=one", content=coded, headers=headers))[0] == coded
    assert refused(client.post("/v1/echo", content=b"\x00\xff")) == (400, "invalid_json")
    for data in (b"\x00\xff", b"\x00" * 200_000):
        echo = client.post("/v1/echo?model=one", content=data).json()
        assert echo["body"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_the_content_type_does_not_matter(client: httpx.Client) -> None:
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-encoding": "identity"}):
        assert (
            received(client.post("/v1/echo", content=b'{"model":"one"}', headers=headers))[0] == b'{"model":"org/one"}'
        )
    assert refused(client.post("/v1/echo", content=b"{", headers={"content-type": "multipart/form-data"}))[0] == 400


@pytest.mark.parametrize(
    ("request_line", "body", "status", "code"),
    [
        ("POST /v1/chat/completions", b'{"model":"nobody"}', 404, "model_not_found"),
        ("POST /v1/chat/completions", b'{"messages":[]}', 400, "model_required"),
        ("POST /v1/chat/completions", b'{"model":null}', 400, "model_required"),
        ("POST /v1/chat/completions", b'{"model":', 400, "invalid_json"),
        ("POST /v1/chat/completions", b'{"model":"one","model":"two"}', 400, "ambiguous_model"),
        ("POST /v1/load_lora_adapter?model=one", b"", 404, "path_not_found"),
        ("POST /v1/sleep", b"", 404, "path_not_found"),
        ("POST /v1/../health", b"", 400, "invalid_path"),
        ("GET /v1", b"", 404, "path_not_found"),
        ("GET /v1/", b"", 404, "path_not_found"),
        ("POST /v1/models", b"", 405, "method_not_allowed"),
        ("DELETE /v1/models/one", b"", 405, "method_not_allowed"),
        ("GET /v1/models/nobody", b"", 404, "model_not_found"),
        ("POST /v1/chat/completions", b'{"model":"away"}', 503, "upstream_unavailable"),
    ],
)
def test_refusals(port: int, servers: tuple[int, int], request_line: str, body: bytes, status: int, code: str) -> None:
    before = [stats(server)["running"] for server in servers]
    head = f"{request_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    head_of_answer, _, answer = raw_exchange(port, head.encode() + body)[0].partition(b"\r\n\r\n")
    assert int(head_of_answer.split(b" ")[1]) == status
    error = json.loads(answer)["error"]
    assert error["code"] == code
    if code == "model_not_found":
        assert "one, two, away, an/alias" in error["message"]
    assert [stats(server)["running"] for server in servers] == before


def test_an_opened_route(client: httpx.Client) -> None:
    assert "extra_paths" not in client.post("/v1/load_lora_adapter", json={"model": "two"}).text
    assert refused(client.post("/v1/load_lora_adapter", json={"model": "one"})) == (404, "path_not_found")


def test_the_messages_api(client: httpx.Client) -> None:
    body = {"model": "an/alias", "max_tokens": 5, "messages": [{"role": "user", "content": "one two"}]}
    assert client.post("/v1/messages", json=body).json()["content"][0]["text"].endswith("heard: one")
    answer = client.post("/v1/messages", json={**body, "model": "nobody"})
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (
        404,
        "error",
        "not_found_error",
    )


def test_the_list(client: httpx.Client) -> None:
    eventually(lambda: len(client.get("/v1/models").json()["data"]) == 7, "the servers' names are known")
    eventually(lambda: client.get("/models/one").json()["state"] == "ready", "the probe saw the server")
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["one", "an/alias", "org/one", "adapter", "two", "both", "away"]
    alias = client.get("/v1/models/an/alias").json()
    assert alias == {
        "id": "an/alias", "object": "model", "created": 1700000000, "owned_by": "vllm", "root": "m", "parent": None,
        "max_model_len": 2048, "model_id": "one", "state": "ready",
    }  # fmt: skip
    assert client.get("/v1/models/an%2Falias").json() == alias
    assert client.get("/v1/models/adapter").json()["parent"] == "org/one"
    assert client.get("/v1/models/away").json()["state"] == "starting"
    head = client.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"")


def test_a_client_that_leaves_while_its_body_is_held(port: int, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nX-Request-Id: leaver\r\nContent-Length: 1000000\r\n\r\n"
    with caplog.at_level(logging.INFO, "fluidmcp_proxy.access"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + b'{"a": "' + b"a" * 100_000)
        line = eventually(lambda: [text for text in caplog.messages if text.startswith("leaver ")], "it is logged")[0]
    assert {"model=-", "status=-"} <= set(line.split())
    assert "outcome=client_left" in line.split()


def test_a_second_name_after_the_first_was_sent(client: httpx.Client, servers: tuple[int, int]) -> None:
    body = b'{"model": "one", "prompt": "' + b"a" * 1_000_000 + b'", "model": "two"}'
    assert refused(client.post("/v1/completions", content=body)) == (400, "ambiguous_model")
    assert stats(servers[0])["running"] == 0, "no whole request has come"
    assert client.post("/v1/completions", json={"model": "one", "prompt": "x"}).status_code == 200


def test_a_held_body_is_bounded(servers: tuple[int, int], server: str) -> None:
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{servers[0]}"}}
    gateway = {"max_body_bytes": 200_000}
    app = Gateway(parse_config({"llmModels": {"one": entry, "two": entry}, "gateway": gateway}, environ={}))
    with serving(app, server) as port:
        url = f"http://127.0.0.1:{port}/v1/echo"
        pieces = [b'{"a": "', *[b"a" * 50_000] * 5, b'", "model": "one"}']
        assert refused(httpx.post(url, content=iter(pieces), timeout=DEADLINE)) == (413, "request_too_large")
        assert httpx.post(url, content=iter([*pieces[:3], pieces[-1]]), timeout=DEADLINE).status_code == 200


def test_a_launched_model_is_found_by_its_name_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("FLUIDMCP_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setenv("FLUIDMCP_RUNTIME_DIR", str(tmp_path / "run"))

    loaded = tmp_path / "loaded"

    def launched(name: str) -> dict[str, Any]:
        port = str(free_port())
        args = [str(STUB), "serve", "x", "--served-model-name", name, "--port", port, "--load-until", str(loaded)]
        return {"command": sys.executable, "args": args}

    app = Gateway(parse_config({"llmModels": {"a": launched("org/a"), "b": launched("org/b")}}, environ={}))
    with serving(app, server) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client:
        assert {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}["org/b"] != "ready"
        loaded.touch()
        for name in ("org/b", "b"):
            body = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
            assert client.post("/v1/chat/completions", json=body).json()["model"] == "org/b"


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[int]:
    """A gateway with two models on demand that are no vLLM: what their servers call themselves is not known yet."""
    args = ["-S", "-E", str(STUB), "serve", "org/M", "--load-time", "0.3", "--port"]
    common = {"command": sys.executable, "start": "on_demand", "stop_timeout": 5}
    models = {
        "m": {**common, "args": [*args, str(free_port())], "aliases": ["other"]},
        "never": {**common, "args": [*args, str(free_port()), "--never-ready"]},
    }
    gateway = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run"), "drain_timeout": 0.1}
    config = parse_config({"llmModels": models, "gateway": gateway}, environ={"PATH": "/usr/bin:/bin"})
    with serving(Gateway(config)) as port:
        yield port


@pytest.mark.parametrize("name", ["m", "other"])
def test_the_first_request_waits_until_the_servers_name_is_known(strangers: int, name: str) -> None:
    url = f"http://127.0.0.1:{strangers}/v1/echo"
    answer = httpx.post(url, json={"model": name, "messages": []}, timeout=DEADLINE)
    assert json.loads(received(answer)[0])["model"] == "org/M"


def test_who_waits_for_a_name_waits_like_anybody_else(strangers: int) -> None:
    url = f"http://127.0.0.1:{strangers}/v1/chat/completions"
    answer = httpx.post(url, json={"model": "never"}, headers={"prefer": "wait=0"}, timeout=DEADLINE)
    assert refused(answer) == (503, "model_starting")
    body = b'{"model": "never"}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    state = f"http://127.0.0.1:{strangers}/models/never"
    with socket.create_connection(("127.0.0.1", strangers)) as client:
        client.sendall(head + body)
        eventually(lambda: httpx.get(state, timeout=DEADLINE).json()["queued"] == 1, "it waits")
    eventually(lambda: httpx.get(state, timeout=DEADLINE).json()["queued"] == 0, "it has left")


def test_a_single_model_needs_no_name(upstream: int) -> None:
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}"}, "aliases": ["x"]}
    app = Gateway(parse_config({"llmModels": {"only": entry}}, environ={}))
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client:
        assert client.get("/v1/echo").status_code == 200
        for sent, got in ((b"{}", b"{}"), (b'{"model":"n"}', b'{"model":"n"}'), (b'{"model":"x"}', b'{"model":"m"}')):
            assert received(client.post("/v1/echo", content=sent))[0] == got
        assert refused(client.post("/v1/echo", content=b"[]")) == (400, "invalid_json")
        wrong = client.post("/v1/chat/completions", json={"model": "wrong", "messages": []})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "NotFoundError")


# What is read of a body, piece by piece


@pytest.mark.parametrize(
    ("query", "name"),
    [(b"", None), (b"model=", None), (b"model=a", "a"), (b"x=1&model=a%2Fb+c", "a/b c"), (b"xmodel=a", None)],
)
def test_queries(query: bytes, name: str | None) -> None:
    assert model_in_query(query) == name
    with pytest.raises(AmbiguousModel):
        model_in_query(b"model=a&model=b")


class Pieces:
    """A client that sends these pieces; ``read`` of them have been asked for."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.read = 0

    async def receive(self) -> dict[str, Any]:
        await anyio.lowlevel.checkpoint()
        self.read += 1
        return {"type": "http.request", "body": self.pieces[self.read - 1], "more_body": self.read < len(self.pieces)}


async def nobody(model: str) -> None:
    pytest.fail(f"{model} is known")


async def choose(names: Catalog, pieces: Pieces) -> tuple[str, Any, list[tuple[bytes, bytes]]]:
    headers = [(b"content-length", str(sum(map(len, pieces.pieces))).encode())]
    body = RequestBody(pieces.receive, headers, 100_000_000, 60)
    model, headers = await choose_model(names, body, headers, b"", nobody)
    return model, await body.start(), headers


async def all_of(content: bytes | AsyncIterator[bytes]) -> bytes:
    return content if isinstance(content, bytes) else b"".join([piece async for piece in content])


@pytest.mark.anyio
async def test_what_follows_the_name_is_not_waited_for() -> None:
    names, _ = catalog(**TWO)
    rest = [b"a" * 70_000] * 20
    pieces = Pieces(b'{"model": "a", "x": "', *rest, b'"}')
    model, content, headers = await choose(names, pieces)
    assert (model, pieces.read) == ("a", 2)
    assert (await all_of(content)).startswith(b'{"model": "org/A", "x": "aaa')
    assert headers == [(b"content-length", str(sum(map(len, pieces.pieces)) + 4).encode())]
    one = b'{"x": "' + b"".join(rest) + b'", "model": "a"}'
    assert (await choose(names, Pieces(one)))[1] == one.replace(b'"a"}', b'"org/A"}'), "a server may send it at once"
    last, read = Pieces(b'{"x": "', *rest, b'", "model": "alias-a"}', b" "), 22
    model, content, headers = await choose(names, last)
    assert (model, last.read) == ("a", read)
    assert (await all_of(content)) == b'{"x": "' + b"".join(rest) + b'", "model": "org/A"} '


@pytest.mark.anyio
@pytest.mark.parametrize("size", [1, 2, 5, 13])
async def test_a_name_over_many_pieces(size: int) -> None:
    names, _ = catalog(**TWO)
    text = b" " * 70_000 + b'{"k": [1, {"model": "no"}], "model": "alias-a", "z": "' + b"z" * 100 + b'"}'
    pieces = Pieces(text[:70_000], *(text[at : at + size] for at in range(70_000, len(text), size)))
    model, content, _ = await choose(names, pieces)
    assert (model, await all_of(content)) == ("a", text.replace(b"alias-a", b"org/A"))


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b'{"a":1,"model":"nobody"}', b"{", b"[1]", b'{"a":"' + b"a" * 200_000])
async def test_a_refusal_is_one_of_ours(body: bytes) -> None:
    names, _ = catalog(**TWO)
    with pytest.raises(GatewayError):
        await choose(names, Pieces(body))
