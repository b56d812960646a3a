"""Starting, stopping and restarting models, and reading their output, over HTTP: who may, and what happens."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Coroutine, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from tests.serving import STUB, eventually, free_port

ALICE, CI, OPS = (f"kanarie-{name}-0123456789abcdef" for name in ("alice", "ci", "ops"))
KEYS = {
    "api_keys": [{"name": "alice", "key": ALICE}, {"name": "ci", "key": CI, "models": ["far"]}],
    "admin_keys": [{"name": "ops", "key": OPS}],
}
OPS_HEADERS = {"authorization": f"Bearer {OPS}"}
PATHS = [("POST", f"/models/m/{verb}") for verb in ("start", "stop", "restart")] + [("GET", "/models/m/logs")]


def gateway(folder: Path, settings: dict[str, Any], **keys: Any) -> Gateway:
    """With a model ``m`` on demand, and ``far``, which somebody else runs."""
    args = ["serve", "m", "--port", str(free_port())]
    model = {"command": sys.executable, "args": ["-S", "-E", str(STUB), *args], "start": "on_demand", **keys}
    models = {"m": model, "far": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}}
    folders = {"log_dir": str(folder / "log"), "runtime_dir": str(folder / "run")}
    return Gateway(parse_config({"llmModels": models, "gateway": {**folders, **settings}}, environ={}))


@pytest.fixture
def app(tmp_path: Path) -> Gateway:
    return gateway(tmp_path, KEYS)


@pytest.fixture
def client(app: Gateway) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def code_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def state(client: TestClient) -> str:
    found: str = client.get("/models/m", headers=OPS_HEADERS).json()["state"]
    return found


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_an_admin_key_there_is_nothing(tmp_path: Path, method: str, path: str) -> None:
    for settings in ({}, {"api_keys": KEYS["api_keys"]}):
        with TestClient(gateway(tmp_path, settings)) as client:
            answer = client.request(method, path, headers={"x-api-key": ALICE})
            assert code_of(answer) == (404, "model_not_found")


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_only_an_admin_key_opens_it(client: TestClient, method: str, path: str) -> None:
    for headers in ({}, {"x-api-key": ALICE}, {"x-api-key": "kanarie-wrong-0123456789abcdef"}):
        answer = client.request(method, path, headers=headers)
        assert code_of(answer) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert code_of(client.request(method, path, headers={"x-api-key": CI})) == (404, "model_not_found")
    assert state(client) == "stopped"


def test_open_to_everybody_but_for_admins(tmp_path: Path) -> None:
    """With admin keys alone, whoever reaches the gateway may use the models, and not stop them."""
    with TestClient(gateway(tmp_path, {"admin_keys": KEYS["admin_keys"]})) as client:
        assert client.get("/models/m").status_code == 200
        assert code_of(client.post("/models/m/start")) == (401, "invalid_api_key")
        assert client.get("/models/m").json()["state"] == "stopped"


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_methods(client: TestClient, method: str, path: str) -> None:
    other, allowed = {"POST": ("GET", "POST"), "GET": ("POST", "GET, HEAD")}[method]
    answer = client.request(other, path, headers=OPS_HEADERS)
    assert code_of(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/models/m/x", "/models/m/start/x", "/models/nobody/start", "/models/m/"])
def test_there_is_nothing_else(client: TestClient, path: str) -> None:
    assert client.post(path, headers=OPS_HEADERS).status_code in (400, 404)


def test_a_life(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fluidmcp_proxy.gateway")

    def ask(verb: str) -> None:
        answer = client.post(f"/models/m/{verb}", headers=OPS_HEADERS)
        assert answer.status_code == 202
        assert answer.json()["id"] == "m"

    ask("start")
    eventually(lambda: state(client) == "ready", "ready")
    assert client.get("/m/v1/models", headers=OPS_HEADERS).status_code == 200
    ask("restart")
    eventually(lambda: client.get("/models/m", headers=OPS_HEADERS).json()["spawns"] == 2, "another start")
    eventually(lambda: state(client) == "ready", "ready")
    ask("stop")
    eventually(lambda: state(client) == "stopped", "stopped")
    assert code_of(client.get("/m/v1/models", headers=OPS_HEADERS)) == (503, "model_stopped")
    ask("start")
    assert client.get("/m/v1/models", headers=OPS_HEADERS).status_code == 200
    asked = [record.getMessage() for record in caplog.records if "asked for" in record.getMessage()]
    assert asked == [f"model m: {verb} asked for by ops" for verb in ("start", "restart", "stop", "start")]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_model_of_somebody_else(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path.replace("/m/", "/far/"), headers=OPS_HEADERS)
    assert code_of(answer) == (409, "model_not_managed")


def test_a_gateway_that_ends_starts_nothing(app: Gateway, client: TestClient) -> None:
    assert client.portal is not None
    client.portal.call(app.begin_shutdown)
    assert code_of(client.post("/models/m/start", headers=OPS_HEADERS)) == (503, "shutting_down")


# Output


def printed(app: Gateway, text: str, replica: str = "m") -> None:
    assert app._fleet is not None
    output = app._fleet.outputs["m"][replica]
    output._file = None  # which is closed when a stream has been drained
    output.feed(text.encode())


def test_the_last_lines(app: Gateway, client: TestClient) -> None:
    printed(app, "".join(f"line {n}\n" for n in range(1200)) + "sk-kanarie0123456789\nunfini")
    answer = client.get("/models/m/logs", headers=OPS_HEADERS)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-request-id"]
    lines = answer.text.splitlines()
    assert len(lines) == 100
    assert lines[-3:] == ["line 1199", "***", "unfini"]
    for count, seen in ((0, 0), (2, 2), (5000, 1000)):
        assert len(client.get(f"/models/m/logs?lines={count}", headers=OPS_HEADERS).text.splitlines()) == seen
    head = client.head("/models/m/logs?follow=true", headers=OPS_HEADERS)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("query", ["lines=x", "lines=-1", "lines=", "lines=10000000", "follow=1", "lines=1&follow="])
def test_a_query_that_is_none(client: TestClient, query: str) -> None:
    assert code_of(client.get(f"/models/m/logs?{query}", headers=OPS_HEADERS)) == (400, "invalid_target")


def test_the_lines_of_replicas_say_whose_they_are(tmp_path: Path) -> None:
    args = ["-S", "-E", str(STUB), "serve", "m"]
    app = gateway(tmp_path, KEYS, args=args, replicas=2)
    with TestClient(app) as client:
        printed(app, "one\n", "m.0")
        printed(app, "two\n", "m.1")
        answer = client.get("/models/m/logs", headers=OPS_HEADERS)
        assert answer.text.splitlines() == ["m.0 | one", "m.1 | two"]


class Follower:
    """A client on the other side of ASGI that reads along."""

    def __init__(self) -> None:
        self.gone = anyio.Event()
        self.text = ""
        self.status = 0
        self.ended = False
        self._asked = False

    async def receive(self) -> MutableMapping[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.text += message["body"].decode()
            self.ended = not message.get("more_body", False)

    async def has(self, condition: Callable[[], Any]) -> None:
        with anyio.fail_after(10):
            while not condition():
                await anyio.sleep(0.01)


Ask = Callable[[Follower], Coroutine[Any, Any, None]]


def asking(app: Gateway) -> Ask:
    scope = {
        "type": "http", "method": "GET", "path": "/models/m/logs", "raw_path": b"/models/m/logs",
        "query_string": b"follow=true&lines=2", "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost"), (b"x-api-key", OPS.encode())],
    }  # fmt: skip
    return lambda follower: app(dict(scope), follower.receive, follower.send)


@pytest.mark.anyio
async def test_following_until_the_client_leaves(app: Gateway) -> None:
    ask = asking(app)
    async with app.run(), anyio.create_task_group() as tasks:
        printed(app, "one\ntwo\nthree\nfo")
        follower, other = Follower(), Follower()
        over = anyio.Event()

        async def follow() -> None:
            await ask(follower)
            over.set()

        tasks.start_soon(follow)
        tasks.start_soon(ask, other)
        await follower.has(lambda: follower.text == "two\nthree\n")
        printed(app, "ur\nfive\n")
        await follower.has(lambda: follower.text == "two\nthree\nfour\nfive\n")
        follower.gone.set()
        with anyio.fail_after(10):
            await over.wait()
        printed(app, "six\n")
        await other.has(lambda: other.text.endswith("five\nsix\n"))
        assert not follower.text.endswith("six\n")
        assert follower.ended
        other.gone.set()


@pytest.mark.anyio
async def test_following_ends_with_the_gateway(app: Gateway) -> None:
    ask, follower = asking(app), Follower()
    async with app.run(), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, follower)
        await follower.has(lambda: follower.status == 200)
        app.begin_shutdown()
        await follower.has(lambda: follower.ended)


@pytest.mark.anyio
async def test_a_flood_skips_what_is_not_kept(app: Gateway) -> None:
    ask, follower = asking(app), Follower()
    async with app.run(), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, follower)
        await follower.has(lambda: follower.status == 200)
        printed(app, "".join(f"{n}\n" for n in range(5000)))
        await follower.has(lambda: follower.text.endswith("4999\n"))
        assert len(follower.text.splitlines()) == 1000
        follower.gone.set()
