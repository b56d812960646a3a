"""Every way to run the gateway: alone, mounted, as a middleware, in the host's lifespan, from the environment."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

import fluidmcp_proxy
from fluidmcp_proxy import Gateway, GatewayMiddleware, create_app
from fluidmcp_proxy.errors import FluidMCPError, LifespanNotRunning
from fluidmcp_proxy.gateway.lifespan import serve_lifespan, surround_lifespan
from tests.gateway.conftest import remote
from tests.serving import DEADLINE, serving

Message = MutableMapping[str, Any]


def test_testclient(upstream: int) -> None:
    gateway = remote(upstream)
    for _ in range(2):  # a gateway may run again
        with TestClient(gateway) as client:
            assert client.get("/m/v1/models").json()["data"][0]["id"] == "m"
            assert client.get("/health").json() == {"status": "ok"}
    assert "not running" in repr(gateway)


def test_streaming_through_testclient(upstream: int) -> None:
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 3}
    with TestClient(remote(upstream)) as client, client.stream("POST", "/m/v1/chat/completions", json=body) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
def test_mounted(upstream: int, framework: Callable[..., Any]) -> None:
    gateway = remote(upstream)
    app = framework(lifespan=gateway.lifespan)
    app.mount("/llm", gateway)
    with TestClient(app) as client:
        assert client.get("/llm/m/v1/models").status_code == 200
        echo = client.get("/llm/m/v1/echo?x=1").json()
        assert echo["target"] == "/v1/echo?x=1"
        assert client.get("/m/v1/models").status_code == 404


def test_in_the_hosts_own_lifespan(upstream: int) -> None:
    gateway = remote(upstream)
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, int]]:
        async with gateway.run():
            answer = await gateway.client("m").post(
                "/chat/completions", json={"model": "m", "messages": [], "max_tokens": 2}
            )
            seen.append(answer.json()["object"])
            yield {"state": 1}

    app = Starlette(routes=[Mount("/llm", app=gateway)], lifespan=lifespan)
    with TestClient(app) as client:
        assert client.get("/llm/m/v1/models").status_code == 200
    assert seen == ["chat.completion"]


def test_without_its_lifespan_it_says_so(upstream: int) -> None:
    client = TestClient(Starlette(routes=[Mount("/llm", app=remote(upstream))]))
    answer = client.get("/llm/m/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "lifespan_not_running")
    assert client.get("/llm/health").status_code == 200


@pytest.mark.anyio
async def test_the_clients_connections_are_the_gateways(upstream: int) -> None:
    gateway = remote(upstream)
    client = gateway.client("m")
    with pytest.raises(httpx.ConnectError, match="lifespan is not running") as caught:
        await client.get("/models")
    assert isinstance(caught.value.__cause__, LifespanNotRunning)
    async with gateway.run():
        assert gateway.client("m") is client
        async with client.stream("GET", "/bytes/100000?chunked=1") as answer:
            assert gateway.status("m").id == "m"
            assert len(await answer.aread()) == 100_000
        await client.aclose()
        assert (await gateway.client("m").get("/models")).status_code == 200
        with pytest.raises(KeyError):
            gateway.client("nobody")
        with pytest.raises(RuntimeError, match="running already"):
            async with gateway.run():
                pass


def host() -> Starlette:
    return Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("the host's"))])


def test_middleware_without_prefix_claims_the_models_only(upstream: int) -> None:
    app = GatewayMiddleware(host(), remote(upstream).config)
    with TestClient(app) as client:
        assert client.get("/m/v1/models").status_code == 200
        for path in ("/", "/health", "/models", "/nobody/v1/models", "/mm"):
            assert client.get(path).text == "the host's"


def test_middleware_with_prefix_claims_everything_below_it(upstream: int) -> None:
    app = GatewayMiddleware(host(), remote(upstream).config, prefix="/llm")
    with TestClient(app) as client:
        assert client.get("/llm/m/v1/models").status_code == 200
        assert client.get("/llm/health").json() == {"status": "ok"}
        assert client.get("/llm/nobody/v1/x").json()["error"]["code"] == "model_not_found"
        for path in ("/", "/m/v1/models", "/llmx/m/v1/models"):
            assert client.get(path).text == "the host's"
    with pytest.raises(ValueError, match="prefix"):
        GatewayMiddleware(host(), remote(upstream).config, prefix="llm/")


def test_middleware_added_the_starlette_way(upstream: int) -> None:
    app = host()
    app.add_middleware(GatewayMiddleware, config=remote(upstream).config)
    with TestClient(app) as client:
        assert client.get("/m/v1/models").status_code == 200
        assert client.get("/x").text == "the host's"


def test_middleware_around_an_app_without_lifespan(upstream: int) -> None:
    async def bare(scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await PlainTextResponse("bare")(scope, receive, send)

    with serving(GatewayMiddleware(bare, remote(upstream).config)) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/m/v1/models", timeout=DEADLINE).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/x", timeout=DEADLINE).text == "bare"


# The lifespan protocol


class Broken(AbstractAsyncContextManager[None]):
    async def __aenter__(self) -> None:
        raise FluidMCPError("mend this")

    async def __aexit__(self, *exc_info: object) -> None:
        raise AssertionError("never entered")


async def speak(app: Callable[..., Awaitable[None]]) -> list[Message]:
    """What an app says when a server starts it and shuts it down."""
    said: list[Message] = []
    heard = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Message:
        await anyio.lowlevel.checkpoint()
        return next(heard)

    async def send(message: Message) -> None:
        said.append(message)

    await app(receive, send)
    return said


@pytest.mark.anyio
async def test_what_the_user_can_mend_is_one_line() -> None:
    said = await speak(lambda receive, send: serve_lifespan(Broken(), receive, send))
    assert said == [{"type": "lifespan.startup.failed", "message": "mend this"}]


@pytest.mark.anyio
@pytest.mark.parametrize("word", ["lifespan.shutdown.complete", "lifespan.startup.failed"])
async def test_the_hosts_last_word_waits_for_the_models_end(word: str) -> None:
    order: list[str] = []

    @asynccontextmanager
    async def models() -> AsyncIterator[None]:
        yield
        await anyio.lowlevel.checkpoint()
        order.append("models gone")

    async def app(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        if word == "lifespan.shutdown.complete":
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": word})
        order.append("host done")

    said = await speak(lambda receive, send: surround_lifespan(models(), app, {"type": "lifespan"}, receive, send))
    assert order == ["host done", "models gone"]
    assert said[-1]["type"] == word


@pytest.mark.anyio
async def test_a_gateway_that_cannot_start_fails_the_hosts_start() -> None:
    async def app(scope: Message, receive: Any, send: Any) -> None:
        raise AssertionError("the host must not start")

    said = await speak(lambda receive, send: surround_lifespan(Broken(), app, {"type": "lifespan"}, receive, send))
    assert said == [{"type": "lifespan.startup.failed", "message": "mend this"}]


# From the environment


@pytest.mark.anyio
async def test_a_bad_file_is_reported_by_the_lifespan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models.json"
    path.write_text("{")
    monkeypatch.setenv("FLUIDMCP_CONFIG", str(path))
    app = fluidmcp_proxy.app
    said = await speak(lambda receive, send: app({"type": "lifespan"}, receive, send))
    assert said[0]["type"] == "lifespan.startup.failed"
    assert said[0]["message"].startswith(f"config_invalid_json: {path}")


def test_app_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: int) -> None:
    path = tmp_path / "models.json"
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}
    path.write_text(json.dumps({"llmModels": {"m": entry}}))
    monkeypatch.setenv("FLUIDMCP_CONFIG", str(path))
    app = create_app()
    assert TestClient(app).get("/health").json()["error"]["code"] == "lifespan_not_running"
    with TestClient(app) as client:
        assert client.get("/m/v1/models").status_code == 200
    monkeypatch.delenv("FLUIDMCP_CONFIG")
    from_path = create_app(path)
    assert isinstance(from_path, Gateway)
    assert isinstance(create_app(from_path.config), Gateway)
