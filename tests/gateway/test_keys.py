"""Keys: who gets in, what there is for them, and that no key is seen anywhere but by the gateway."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from fluidmcp_proxy import Gateway, GatewayConfig
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway.keys import NOBODY, Keyring
from tests.gateway.test_websocket import dial, refused
from tests.serving import DEADLINE, eventually, free_port, serving, stub

ALICE, CI, OPS = (f"kanarie-{name}-0123456789abcdef" for name in ("alice", "ci", "ops"))
KEYS = {
    "api_keys": [
        {"name": "alice", "key": ALICE},
        {"name": "ci", "sha256": hashlib.sha256(CI.encode()).hexdigest(), "models": ["a"]},
    ],
    "admin_keys": [{"name": "ops", "key": OPS}],
}


def configured(port: int, settings: dict[str, Any], **models: Any) -> GatewayConfig:
    """Two models of one server, ``a`` and ``b``."""
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}}
    entries = {name: {**entry, **models.get(name, {})} for name in ("a", "b")}
    return parse_config({"llmModels": entries, "gateway": settings}, environ={})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def client(upstream: int) -> Iterator[TestClient]:
    aliases = {"a": {"aliases": ["first"]}, "b": {"aliases": ["second"]}}
    with TestClient(Gateway(configured(upstream, KEYS, **aliases))) as client:
        yield client


def code_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


PATHS = (
    "/static/x", "/static/", "/static/page.html",
    "/models", "/models/a", "/models/nobody", "/v1/models", "/v1/models/a", "/v1/chat/completions",
    "/a/v1/models", "/nobody/v1/models", "/a/tokenize", "/a/mcp", "/metrics", "/health/x", "/Health", "/x",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{}, bearer("kanarie-wrong-0123456789abcdef"), {"x-api-key": ""}])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_stranger_learns_nothing(client: TestClient, path: str, headers: dict[str, str], method: str) -> None:
    answer = client.request(method, path, headers=headers)
    assert code_of(answer) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert "kanarie" not in answer.text
    assert answer.json()["error"]["type"] == "authentication_error"


def test_health_and_readiness_are_for_everybody(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    eventually(lambda: client.get("/ready").status_code == 200, "ready")
    for headers in ({}, bearer("wrong-0123456789abcdef")):
        assert client.get("/ready", headers=headers).content == b""
    assert client.get("/ready", headers=bearer(ALICE)).json()["models"].keys() == {"a", "b"}
    assert client.get("/ready", headers=bearer(CI)).json()["models"].keys() == {"a"}


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE),
        {"authorization": f"bEARER {ALICE}"},
        {"authorization": f"Bearer   {ALICE} "},
        {"x-api-key": ALICE},
        {"x-api-key": ALICE, "authorization": "Bearer somebody-else-s"},
        {"x-api-key": "somebody-else-s", "authorization": f"Bearer {ALICE}"},
        bearer(OPS),
    ],
)
def test_a_key_opens(client: TestClient, headers: dict[str, str]) -> None:
    for path in ("/a/v1/models", "/b/v1/models", "/models", "/models/b", "/v1/models", "/v1/models/b"):
        assert client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE[:-1]), bearer(ALICE + "x"), bearer(ALICE.upper()), {"authorization": ALICE},
        {"authorization": f"Basic {ALICE}"}, {"authorization": f"Bearer{ALICE}"}, {"authorization": "Bearer"},
        bearer(hashlib.sha256(CI.encode()).hexdigest()), {"api-key": ALICE}, {"cookie": f"x-api-key={ALICE}"},
    ],
)  # fmt: skip
def test_what_is_no_key(client: TestClient, headers: dict[str, str]) -> None:
    assert code_of(client.get("/a/v1/models", headers=headers)) == (401, "invalid_api_key")


def test_a_key_in_the_query_is_none(client: TestClient) -> None:
    answer = client.get(f"/a/v1/models?api_key={ALICE}&key={ALICE}&x-api-key={ALICE}")
    assert code_of(answer) == (401, "invalid_api_key")


def test_anthropics_clients_are_refused_in_their_form(client: TestClient) -> None:
    answer = client.post("/a/v1/messages", headers={"x-api-key": "wrong"}, json={})
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["type"] == "error"


# Limited keys


def chat(client: TestClient, name: str | None, key: str, path: str = "/v1/echo") -> Any:
    body = {"messages": []} if name is None else {"model": name, "messages": []}
    return client.post(path, json=body, headers=bearer(key))


def test_other_models_are_not_there(client: TestClient) -> None:
    headers = bearer(CI)
    assert client.get("/a/v1/models", headers=headers).status_code == 200
    assert chat(client, "first", CI).status_code == 200
    for path in ("/b/v1/models", "/models/b", "/v1/models/b", "/v1/models/second"):
        answer = client.get(path, headers=headers)
        there = client.get(path.replace("b", "nobody").replace("second", "nobody"), headers=headers)
        assert code_of(answer) == code_of(there) == (404, "model_not_found")
        assert "second" not in answer.json()["error"]["message"].partition("'second'")[2]
        assert "The models are: a" in answer.json()["error"]["message"]
    assert [model["id"] for model in client.get("/models", headers=headers).json()["models"]] == ["a"]
    listed = {card["id"] for card in client.get("/v1/models", headers=headers).json()["data"]}
    assert {"a", "first"} <= listed
    assert not {"b", "second"} & listed
    assert {card["id"] for card in client.get("/v1/models", headers=bearer(ALICE)).json()["data"]} >= {"b", "second"}


def test_what_tells_of_all_models_is_for_keys_to_all(client: TestClient) -> None:
    answer = client.get("/metrics", headers=bearer(ALICE))
    assert answer.status_code == 200
    assert 'model_id="b"' in answer.text
    assert "alice" not in answer.text
    assert code_of(client.get("/metrics", headers=bearer(CI))) == (404, "path_not_found")
    assert client.get("/metrics", headers=bearer(OPS)).status_code == 200


def test_what_the_server_serves_is_not_ambiguous_for_one_who_sees_one_model(client: TestClient) -> None:
    client.get("/v1/models", headers=bearer(ALICE))
    assert code_of(chat(client, "m", ALICE)) == (400, "ambiguous_model")
    assert chat(client, "m", CI).status_code == 200
    assert "m" in {card["id"] for card in client.get("/v1/models", headers=bearer(CI)).json()["data"]}


def test_a_single_model_is_meant_by_everything(client: TestClient) -> None:
    """Also by the name of one that this key does not open: the request goes to the key's own model."""
    assert code_of(chat(client, None, ALICE)) == (400, "model_required")
    for name in (None, "b"):
        answer = chat(client, name, CI)
        assert answer.status_code == 200
        assert answer.json()["target"] == "/v1/echo"
    assert code_of(chat(client, None, CI, "/b/v1/echo")) == (404, "model_not_found")


# What the model's server gets


def received(answer: Any) -> list[tuple[str, str]]:
    assert answer.status_code == 200, answer.text
    return [(name.lower(), value) for name, value in answer.json()["headers"]]


@pytest.mark.parametrize(
    ("sent", "crosses"),
    [
        ([("authorization", f"Bearer {ALICE}")], []),
        ([("x-api-key", ALICE)], []),
        ([("authorization", f"Bearer {ALICE}"), ("x-api-key", "theirs")], [("x-api-key", "theirs")]),
        ([("x-api-key", ALICE), ("authorization", "Bearer theirs")], [("authorization", "Bearer theirs")]),
        ([("x-api-key", ALICE), ("authorization", f"Bearer {OPS}")], []),
        ([("authorization", f"bearer  {ALICE}"), ("authorization", "Bearer theirs")], []),
    ],
)
def test_only_the_gateways_key_stays_here(client: TestClient, sent: Any, crosses: Any) -> None:
    for path in ("/a/v1/echo", "/v1/echo?model=a"):
        got = received(client.get(path, headers=sent))
        assert [pair for pair in got if pair[0] in ("authorization", "x-api-key")] == crosses
        assert "kanarie" not in str(got)


def test_a_models_own_key_takes_the_place(upstream: int) -> None:
    app = Gateway(configured(upstream, KEYS, a={"api_key": "the-models"}))
    with TestClient(app) as client:
        headers = {"x-api-key": ALICE, "authorization": "Bearer theirs"}
        got = received(client.get("/a/v1/echo", headers=headers))
        assert [value for name, value in got if name == "authorization"] == ["Bearer the-models"]


def test_without_keys_everything_crosses(upstream: int) -> None:
    with TestClient(Gateway(configured(upstream, {}))) as client:
        got = received(client.get("/a/v1/echo", headers={"authorization": "Bearer theirs", "x-api-key": "theirs"}))
        assert {("authorization", "Bearer theirs"), ("x-api-key", "theirs")} <= set(got)


def test_with_admin_keys_only_it_is_open(upstream: int) -> None:
    with TestClient(Gateway(configured(upstream, {"admin_keys": KEYS["admin_keys"]}))) as client:
        assert client.get("/models").status_code == 200
        assert eventually(lambda: client.get("/ready").json()["ready"], "ready")
        assert ("authorization", "Bearer theirs") in received(client.get("/a/v1/echo", headers=bearer("theirs")))
        assert "kanarie" not in str(received(client.get("/a/v1/echo", headers=bearer(OPS))))


@pytest.mark.anyio
async def test_the_hosts_own_code_needs_no_key(upstream: int) -> None:
    async with Gateway(configured(upstream, KEYS)).run() as gateway:
        assert (await gateway.client("a").get("/models")).status_code == 200


def test_no_request_names_an_upstream_a_command_or_an_environment(upstream: int) -> None:
    """Whatever a key opens: where requests go is in the configuration only."""
    elsewhere = f"http://127.0.0.1:{free_port()}"
    entry = {"command": "touch", "args": ["/tmp/x"], "env": {"A": "b"}, "endpoints": {"base_url": elsewhere}}
    with TestClient(Gateway(configured(upstream, KEYS))) as client:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            for path in ("/models", "/models/a", "/v1/models/a"):
                answer = client.request(method, path, json=entry, headers=bearer(OPS))
                assert code_of(answer) == (405, "method_not_allowed")
        hints = {
            **bearer(OPS),
            "host": "127.0.0.1:1",
            "x-forwarded-host": "127.0.0.1:1",
            "forwarded": "host=127.0.0.1:1",
        }
        answer = client.post(f"/a/v1/echo?base_url={elsewhere}", json={"model": "a", **entry}, headers=hints)
        assert ("host", f"127.0.0.1:{upstream}") in received(answer)
        assert code_of(client.post("/v1/echo", json={"model": elsewhere}, headers=bearer(OPS))) == (
            404,
            "model_not_found",
        )
        assert [model["id"] for model in client.get("/models", headers=bearer(OPS)).json()["models"]] == ["a", "b"]


# WebSockets


@pytest.fixture(scope="module")
def port(upstream: int) -> Iterator[int]:
    with serving(Gateway(configured(upstream, KEYS))) as port:
        yield port


def test_a_websocket_needs_a_key_before_its_handshake(port: int) -> None:
    for headers in ({}, bearer("wrong-0123456789abcdef")):
        status, answer, body = refused(port, "/a/v1/realtime", headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert answer["www-authenticate"] == "Bearer"
    assert refused(port, "/b/v1/realtime", bearer(CI))[2]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("headers", [bearer(CI), {"x-api-key": CI}])
def test_a_websocket_with_a_key(port: int, headers: dict[str, str]) -> None:
    with dial(port, "/a/v1/realtime", headers) as client:
        client.send("stub:request")
        asked = str(client.recv(timeout=DEADLINE))
        assert "realtime" in asked
        assert "kanarie" not in asked


def test_a_websocket_whose_key_is_a_subprotocol(port: int) -> None:
    """As OpenAI's clients do it in a browser, which can set no headers."""
    offered = ["realtime", f"openai-insecure-api-key.{CI}", "openai-beta.realtime-v1"]
    with dial(port, "/a/v1/realtime", subprotocols=[Subprotocol(word) for word in offered]) as client:
        client.send("stub:request")
        asked = json.loads(client.recv(timeout=DEADLINE))
        assert client.subprotocol in ("realtime", None)
    got = {name.lower(): value for name, value in asked["headers"]}
    assert got["sec-websocket-protocol"].replace(" ", "") == "realtime,openai-beta.realtime-v1"
    assert "kanarie" not in str(asked)
    wrong = [Subprotocol("openai-insecure-api-key.wrong-0123456789")]
    with pytest.raises(InvalidStatus) as caught, dial(port, "/a/v1/realtime", subprotocols=wrong):
        pass
    assert caught.value.response.status_code == 401


# Nothing is told


def test_every_key_is_seen_by_nobody_else(upstream: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = configured(upstream, KEYS)
    seen = [
        repr(config),
        str(config),
        repr(config.settings),
        config.settings.model_dump_json(),
        repr(Keyring(config.settings)),
    ]
    gateway = Gateway(config)
    seen.append(repr(gateway) + repr(vars(gateway)) + repr(vars(gateway._table.entrance)))
    with TestClient(gateway) as client:
        for key in (ALICE, CI, OPS):
            for headers in (bearer(key), {"x-api-key": key}, {"authorization": f"Basic {key}"}):
                for path in (*PATHS, "/a/v1/echo", "/b/v1/echo", "/v1/echo?model=a", "/health", "/ready"):
                    for answer in (client.get(path, headers=headers), client.post(path, headers=headers)):
                        if '"headers"' not in answer.text or "Basic" not in str(headers):
                            seen.append(f"{answer.headers} {answer.text}")
    seen.append(caplog.text)
    for key in (ALICE, CI, OPS):
        assert not [text for text in seen if key in text]
    names = {line.rpartition("key=")[2] for line in caplog.messages if "outcome=" in line}
    assert names == {"alice", "ci", "ops", "-"}


def test_the_log_names_the_key_also_where_nothing_is_found(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fluidmcp_proxy.access")
    ours = {"x-request-id": "ours"}  # a WebSocket of an earlier test may end only now
    client.get("/a/v1/models", headers=ours | bearer(CI))
    client.get("/b/v1/models", headers=ours | bearer(CI))
    client.get("/b/v1/models", headers=ours)
    lines = [line for line in caplog.messages if line.startswith("ours ")]
    assert [line.rpartition("key=")[2] for line in lines] == ["ci", "ci", "-"]


# The keyring alone


def keyring(**settings: Any) -> Keyring:
    return Keyring(configured(1, settings).settings)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an early end, which would tell by its time where a key is in the list."""
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(known: bytes, digest: bytes) -> bool:
        compared.append(known)
        return real(known, digest)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = keyring(**KEYS)
    for key in (ALICE, CI, OPS, "wrong"):
        compared.clear()
        ring.identify([(b"x-api-key", key.encode())])
        assert len(compared) == len(set(compared)) == 3


def test_what_a_request_is_told_by() -> None:
    ring = keyring(**KEYS)
    assert repr(ring) == "<Keyring alice, ci, ops>"
    assert ring.limits() == {frozenset({"a"})}
    assert ring.identify([]) is NOBODY
    told = ring.identify([(b"x-api-key", OPS.encode()), (b"authorization", b"Bearer x")])
    assert told.holder is not None
    assert told.holder.is_admin
    assert told.headers == {b"x-api-key"}
    first = ring.identify([(b"x-api-key", CI.encode()), (b"authorization", b"Bearer " + OPS.encode())])
    assert (first.name, first.models, len(first.headers)) == ("ci", frozenset({"a"}), 2)


def test_an_odd_subprotocol_is_no_key() -> None:
    ring = keyring(**KEYS)
    for word in ("openai-insecure-api-key.", "openai-insecure-api-key.\ud800", f"OpenAI-insecure-api-key.{CI}", CI):
        assert ring.identify([], [word]) is NOBODY


def test_keys_with_a_server_that_has_its_own() -> None:
    """The gateway's key opens the gateway, the model's key the model."""
    with (
        stub("--api-key", "the-servers") as upstream,
        TestClient(Gateway(configured(upstream, KEYS, a={"api_key": "the-servers"}))) as client,
    ):
        assert client.get("/a/v1/models", headers=bearer(ALICE)).status_code == 200
        assert client.get("/b/v1/models", headers=bearer(ALICE)).status_code == 401
        both = {"x-api-key": ALICE, **bearer("the-servers")}
        assert client.get("/b/v1/models", headers=both).status_code == 200
