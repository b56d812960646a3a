"""Names: whose they are, what a server calls a model, what servers say and when they are asked."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import AmbiguousModel, GatewayError, ModelNotFound, ModelRequired, UpstreamUnavailable
from fluidmcp_proxy.models.catalog import Catalog, Found, list_models
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import ModelState, ModelStatus
from fluidmcp_proxy.upstream.client import Body, Headers, Response, Transport
from tests.models.doubles import FakeResponse
from tests.models.virtual_time import BACKEND

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


class Lister:
    """A transport to a server that lists what ``content`` returns, which may raise."""

    def __init__(self, content: Callable[[], bytes], status: int = 200) -> None:
        self.content = content
        self.status = status
        self.asked: list[tuple[bytes, Headers]] = []
        self.answer = anyio.Event()
        self.answer.set()

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        self.asked.append((target, headers))
        await self.answer.wait()
        yield FakeResponse(self.status, self.content())

    def open_websocket(self, *_: Any, **__: Any) -> Any:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


class Listed:
    """A server that only has a transport and a status."""

    def __init__(self, config: ModelConfig, *names: str) -> None:
        self.config = config
        self.lister = Lister(lambda: listing(*names))
        self.transport: Transport | None = self.lister
        self.status = ModelStatus(id=config.id, state=ModelState.READY, since=5.0)

    def stopped(self) -> None:
        self.transport = None
        self.status = ModelStatus(id=self.config.id, state=ModelState.STOPPED, since=9.0)


def listing(*names: str, **more: Any) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": name, "object": "model", **more} for name in names]}).encode()


def launched(port: int, *args: str, **keys: Any) -> dict[str, Any]:
    return {"command": "vllm", "args": ["serve", *args, "--port", str(port)], **keys}


def remote(port: int, **keys: Any) -> dict[str, Any]:
    return {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}, **keys}


def catalog(listed: dict[str, list[str]] | None = None, **entries: Any) -> tuple[Catalog, dict[str, Listed]]:
    models = parse_config({"llmModels": entries}, environ={}).models
    servers = {name: Listed(config, *(listed or {}).get(name, [])) for name, config in models.items()}
    return Catalog(cast("dict[str, Server]", servers)), servers


TWO: dict[str, Any] = {
    "a": launched(8001, "org/A", aliases=["alias-a", "x/y"]),
    "b": launched(8002, "org/B", "--served-model-name", "bee", "bee2"),
}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a", Found("a", "org/A")),
        ("alias-a", Found("a", "org/A")),
        ("x/y", Found("a", "org/A")),
        ("org/A", Found("a")),
        ("b", Found("b", "bee")),
        ("bee", Found("b")),
        ("bee2", Found("b")),
    ],
)
async def test_names_of_models_that_never_ran(name: str, found: Found) -> None:
    names, servers = catalog(**TWO)
    assert names.find(name) == await names.look_up(name) == found
    assert not any(server.lister.asked for server in servers.values())


async def test_an_unknown_name() -> None:
    names, _ = catalog(**TWO)
    for name in ("org/B", "", "A", "org/a"):
        with pytest.raises(ModelNotFound, match="a, b, alias-a, x/y, org/A, bee, bee2") as caught:
            await names.look_up(name)
        assert caught.value.param == "model"
    with pytest.raises(ModelRequired, match="a, b, alias-a"):
        await names.look_up(None)


async def test_a_name_of_two() -> None:
    names, _ = catalog(a=launched(8001, "org/m"), b=launched(8002, "org/m"))
    with pytest.raises(AmbiguousModel, match="a, b all serve 'org/m'"):
        await names.look_up("org/m")
    assert [card["id"] for card in names.cards()] == ["a", "b"]
    with pytest.raises(AmbiguousModel):
        names.card("org/m")


async def test_an_id_comes_before_a_served_name() -> None:
    names, _ = catalog(a=launched(8001, "b"), b=launched(8002, "m"))
    assert names.find("b") == Found("b", "m")
    assert [(card["id"], card["model_id"]) for card in names.cards()] == [("a", "a"), ("b", "b"), ("m", "b")]


async def test_a_single_model_is_meant_by_everything() -> None:
    names, servers = catalog(m=launched(8001, "org/m", aliases=["x"]))
    assert await names.look_up(None) == await names.look_up("anything") == await names.look_up("org/m") == Found("m")
    assert await names.look_up("x") == await names.look_up("m") == Found("m", "org/m")
    assert names.is_single
    assert not servers["m"].lister.asked
    with pytest.raises(ModelNotFound):
        names.find("anything")


@pytest.mark.parametrize(
    ("stated", "listed", "rename"),
    [
        (["s"], [], "s"),
        (["s", "t"], ["s", "t"], "s"),
        (["s", "t"], ["t"], "t"),
        (["s"], ["other"], "other"),
        (["s"], ["one", "two"], "s"),  # a list of what it could serve: transformers'
        ([], ["one"], "one"),
        ([], ["one", "two"], None),
        ([], [], None),
        (["s"], ["s", "m"], None),
    ],
)
async def test_what_the_server_calls_it(stated: list[str], listed: list[str], rename: str | None) -> None:
    args = ["--served-model-name", *stated] if stated else ["--config", "x"]
    names, _ = catalog(m=launched(8001, *args))
    names.learn("m", tuple({"id": name} for name in listed))
    assert names.find("m") == Found("m", rename)


async def test_what_servers_list_is_found() -> None:
    names, servers = catalog({"o": ["llama3:8b", "qwen"], "b": ["bee"]}, o=remote(1), b=launched(8002, "bee"))
    assert await names.look_up("llama3:8b") == Found("o")
    assert await names.look_up("o") == Found("o")
    asked = len(servers["o"].lister.asked)
    with pytest.raises(ModelNotFound, match="llama3:8b"):
        await names.look_up("nobody's")
    assert len(servers["o"].lister.asked) == asked == 1, "it has just been asked"


async def test_adapters_are_found_but_are_not_the_model() -> None:
    names, servers = catalog(m=remote(1), n=remote(2))
    cards = {"data": [{"id": "lora", "parent": "base"}, {"id": "base", "parent": None}]}
    servers["m"].lister.content = lambda: json.dumps(cards).encode()
    assert await names.look_up("lora") == Found("m")
    assert await names.look_up("m") == Found("m", "base")


async def test_the_first_request_to_a_server_nobody_knows() -> None:
    names, servers = catalog({"m": ["base"]}, m=remote(1, api_key="k"), n=remote(2))
    assert await names.look_up("m") == Found("m", "base")
    ((target, headers),) = servers["m"].lister.asked
    assert target == b"/v1/models"
    assert (b"authorization", b"Bearer k") in headers


async def test_many_who_ask_at_once_are_one_question() -> None:
    names, servers = catalog({"m": ["base"]}, m=remote(1), n=remote(2))
    lister = servers["m"].lister
    lister.answer = anyio.Event()
    found: list[Found] = []

    async def look_up(task_status: Any = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        found.append(await names.look_up("base"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as first:
                first.start_soon(look_up)
                while not lister.asked:
                    await anyio.lowlevel.checkpoint()
                for _ in range(5):
                    await tasks.start(look_up)
                first.cancel_scope.cancel()  # who asks may leave; another one asks then
            while len(lister.asked) < 2:
                await anyio.lowlevel.checkpoint()
            lister.answer.set()
    assert found == [Found("m")] * 5
    assert len(lister.asked) == 2


async def test_a_list_starts_nothing_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluidmcp_proxy.models.catalog._PATIENCE", 0.05)
    names, servers = catalog({"a": ["org/A"], "b": ["bee"]}, **TWO)
    servers["a"].stopped()
    servers["b"].lister.answer = anyio.Event()
    with anyio.fail_after(5):
        await names.refresh()
    cards = {card["id"]: card for card in names.cards()}
    assert list(cards) == ["a", "alias-a", "x/y", "org/A", "b", "bee", "bee2"]
    assert cards["x/y"] == {
        "id": "x/y", "object": "model", "created": 9, "owned_by": "fluidmcp", "model_id": "a", "state": "stopped",
    }  # fmt: skip
    assert len(servers["b"].lister.asked) == 1


async def test_cards_have_what_the_server_says() -> None:
    names, servers = catalog(a=launched(8001, "org/A"), b=launched(8002, "org/B"))
    said = {"id": "org/A", "created": 7, "owned_by": "vllm", "max_model_len": 99, "state": "bad", "object": "thing"}
    servers["a"].lister.content = lambda: json.dumps({"data": [said]}).encode()
    await names.refresh()
    expected = {
        "object": "model", "created": 7, "owned_by": "vllm", "max_model_len": 99, "model_id": "a", "state": "ready",
    }  # fmt: skip
    assert names.card("a") == {"id": "a", **expected}
    assert names.card("org/A") == {"id": "org/A", **expected}
    servers["a"].stopped()
    assert names.card("a") == {"id": "a", **expected, "state": "stopped"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"data": 1}', b'{"data": [1]}', b'{"data": [{}]}', b"[" * 100_000, b"\xff", b"x" * 2_000_000],
)
async def test_what_is_no_list_changes_nothing(content: bytes) -> None:
    names, servers = catalog(m=launched(8001, "org/m"))
    servers["m"].lister.content = lambda: content
    await names.refresh()
    assert names.find("m") == Found("m", "org/m")
    assert await list_models(Lister(listing, status=401), servers["m"].config) is None


@pytest.mark.parametrize("name", ["", 1, None])
async def test_names_that_are_none(name: Any) -> None:
    config = parse_config({"llmModels": {"m": remote(1)}}, environ={}).models["m"]
    listed = await list_models(Lister(lambda: listing(name)), config)
    assert not listed


async def test_a_server_that_is_gone() -> None:
    def gone() -> bytes:
        raise UpstreamUnavailable("gone")

    names, servers = catalog(**TWO)
    servers["a"].lister.content = gone
    await names.refresh()
    assert names.find("a") == Found("a", "org/A")


async def test_ready_servers_are_compared_with_their_arguments(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluidmcp_proxy.models.catalog._WATCH_PERIOD", 0.01)
    monkeypatch.setattr("fluidmcp_proxy.models.catalog._FRESH", 0.0)
    names, servers = catalog({"a": ["other"], "b": ["bee", "bee2"]}, **TWO)
    stopped = servers["a"].status
    servers["a"].stopped()
    with caplog.at_level(logging.WARNING), anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(names.watch)
            while not servers["b"].lister.asked:
                await anyio.lowlevel.checkpoint()
            assert not servers["a"].lister.asked
            servers["a"].transport, servers["a"].status = servers["a"].lister, stopped
            while not caplog.messages:
                await anyio.sleep(0.001)
            for _ in range(5):
                await anyio.sleep(0.01)
            names.close()
    assert caplog.messages == ["model a: its server does not serve org/A, which its arguments name, but other"]
    assert len(servers["a"].lister.asked) == len(servers["b"].lister.asked) == 1


async def test_errors_can_be_told() -> None:
    names, _ = catalog(**TWO)
    names.learn("a", tuple({"id": f"name-{number}"} for number in range(1000)))
    with pytest.raises(GatewayError) as caught:
        names.find("n" * 5000)
    assert len(caught.value.message) < 1000
    assert caught.value.message.endswith(", ….")
