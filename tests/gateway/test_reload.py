"""Another configuration for a running gateway: what stays, what goes, what comes, and who waits."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from fluidmcp_proxy import Gateway, GatewayConfig
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.errors import FluidMCPError, ModelNotFound, ShuttingDown
from fluidmcp_proxy.models.state import ModelState
from tests.serving import DEADLINE, STUB, free_port

pytestmark = pytest.mark.anyio

READY = ModelState.READY


class File:
    """A configuration to be changed."""

    def __init__(self, folder: Path) -> None:
        self.settings: dict[str, Any] = {"log_dir": str(folder / "log"), "runtime_dir": str(folder / "run")}
        self.models: dict[str, Any] = {}

    def add(self, name: str, *arguments: str, **keys: Any) -> None:
        args = ["-S", "-E", str(STUB), "serve", name, "--port", str(free_port()), *arguments]
        self.models[name] = {"command": sys.executable, "args": args, "stop_timeout": 2, **keys}

    def read(self) -> GatewayConfig:
        document = {"llmModels": self.models, "gateway": self.settings}
        return parse_config(document, source="/nowhere/models.json", environ={})


@pytest.fixture
def file(tmp_path: Path) -> File:
    file = File(tmp_path)
    for name in ("a", "b"):
        file.add(name)
    return file


@asynccontextmanager
async def running(file: File) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    """With all models ready, and a client without a network between."""
    gateway = Gateway(file.read())
    async with gateway.run():
        for name in file.models:
            if gateway.config.models[name].start == "eager":
                await until(partial(is_ready, gateway, name))
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=DEADLINE) as client:
            yield gateway, client


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(DEADLINE):
        while not condition():
            await anyio.sleep(0.01)


def is_ready(gateway: Gateway, name: str) -> bool:
    return gateway.status(name).state is READY


async def code(client: httpx.AsyncClient, path: str, **keys: Any) -> int:
    return (await client.get(path, **keys)).status_code


async def test_nothing_changes(file: File) -> None:
    async with running(file) as (gateway, client):
        before = [gateway.status(name) for name in ("a", "b")]
        assert gateway.reload(file.read()) == ((), (), (), ())
        await anyio.sleep(0.1)
        assert [gateway.status(name) for name in ("a", "b")] == before
        assert await code(client, "/a/v1/models") == 200


async def test_a_changed_model_is_replaced_and_its_requests_wait(file: File) -> None:
    async with running(file) as (gateway, client):
        pids = {name: gateway.status(name).pid for name in ("a", "b")}
        file.models["a"]["args"] += ["--served-model-name", "new"]
        assert gateway.reload(file.read()) == ((), ("a",), (), ())
        answer = await client.get("/a/v1/models")
        assert (answer.status_code, answer.json()["data"][0]["id"]) == (200, "new")
        assert gateway.status("a").pid != pids["a"]
        assert gateway.status("b").pid == pids["b"]
        answer = await client.get("/v1/models/new")
        assert answer.json()["model_id"] == "a"
        assert [model["id"] for model in (await client.get("/models")).json()["models"]] == ["a", "b"]


async def test_a_changed_model_finishes_what_is_inside(file: File) -> None:
    """Its successor needs the port, so it is not started before."""
    body = {"model": "a", "prompt": "x", "stream": True, "max_tokens": 30, "stub": {"token-interval": 0.03}}
    texts: list[str] = []

    async def generate(client: httpx.AsyncClient) -> None:
        texts.append((await client.post("/a/v1/completions", json=body)).text)

    async with running(file) as (gateway, client), anyio.create_task_group() as tasks:
        tasks.start_soon(generate, client)
        assert gateway._fleet is not None
        fleet = gateway._fleet
        await until(lambda: fleet.scheduler.in_flight("a"))
        file.models["a"]["max_queue"] = 7
        gateway.reload(file.read())
        assert await code(client, "/a/v1/models") == 200
        await until(lambda: texts)
        assert texts[0].count("data: ") >= 30
        assert texts[0].endswith("data: [DONE]\n\n")
        assert gateway.status("a").spawns == 1


async def test_models_come_and_go(file: File) -> None:
    async with running(file) as (gateway, client):
        pid = gateway.status("b").pid
        del file.models["a"]
        file.add("c")
        assert gateway.reload(file.read()) == (("c",), (), ("a",), ())
        assert await code(client, "/a/v1/models") == 404
        assert await code(client, "/models/a") == 404
        assert await code(client, "/c/v1/models") == 200
        assert gateway.status("b").pid == pid
        with pytest.raises(KeyError):
            gateway.status("a")
        with pytest.raises(KeyError):
            gateway.client("a")


async def test_ports_are_swapped(file: File) -> None:
    async with running(file) as (gateway, client):
        a, b = file.models["a"]["args"], file.models["b"]["args"]
        a[6], b[6] = b[6], a[6]
        assert gateway.reload(file.read()).changed == ("a", "b")
        for name in ("a", "b"):
            answer = await client.get(f"/{name}/v1/models")
            assert answer.json()["data"][0]["id"] == name
            assert gateway.status(name).spawns == 1


async def test_who_waits_for_a_model_that_is_replaced_is_told_to_come_again(file: File) -> None:
    file.add("a", "--load-time", "600", start="on_demand")
    answers: list[httpx.Response] = []

    async def ask(client: httpx.AsyncClient) -> None:
        answers.append(await client.get("/a/v1/models"))

    async with running(file) as (gateway, client), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, client)
        await until(lambda: gateway.status("a").state is ModelState.STARTING)
        file.add("a")
        gateway.reload(file.read())
        await until(lambda: answers)
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "shutting_down"
        assert answers[0].headers["retry-after"]
        assert await code(client, "/a/v1/models") == 200


async def test_a_group_is_never_awake_twice(file: File) -> None:
    """Also not when the one that is awake is replaced, and another one is wanted."""
    for name in ("a", "b"):
        file.models[name] |= {"group": "g", "start": "on_demand"}
    async with running(file) as (gateway, client):
        assert await code(client, "/a/v1/models") == 200
        file.models["a"]["max_queue"] = 7
        gateway.reload(file.read())
        codes: dict[str, int] = {}

        async def ask(name: str) -> None:
            codes[name] = await code(client, f"/{name}/v1/models")

        async with anyio.create_task_group() as tasks:
            for name in ("a", "b"):
                tasks.start_soon(ask, name)
            while len(codes) < 2:
                assert sum(gateway.status(name).pid is not None for name in ("a", "b")) <= 1
                await anyio.sleep(0.01)
        assert codes == {"a": 200, "b": 200}


async def test_a_changed_model_of_somebody_else(file: File) -> None:
    """It is used at once: nothing has to be stopped."""
    async with running(file) as (gateway, client):
        port = file.models["a"]["args"][6]
        file.models["far"] = {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}
        gateway.reload(file.read())
        assert await code(client, "/far/v1/models") == 503
        far = httpx.URL(f"http://127.0.0.1:{port}/v1")
        del file.models["a"], file.models["b"]
        file.add("b")
        file.models["far"]["endpoints"]["base_url"] = str(far)
        gateway.reload(file.read())
        assert gateway.config.models["far"].endpoint is not None
        assert gateway.config.models["far"].endpoint.port == far.port


async def test_replicas_come(file: File) -> None:
    async with running(file) as (gateway, client):
        args = ["-S", "-E", str(STUB), "serve", "a"]
        file.models["a"] = {"command": sys.executable, "args": args, "replicas": 2}
        gateway.reload(file.read())
        assert await code(client, "/a/v1/models") == 200
        await until(lambda: all(one.state is READY for one in gateway.status("a").replicas))
        assert len(gateway.status("a").replicas) == 2


async def test_keys_change(file: File) -> None:
    async with running(file) as (gateway, client):
        file.settings["api_keys"] = ["0123456789abcdef"]
        gateway.reload(file.read())
        assert await code(client, "/a/v1/models") == 401
        assert await code(client, "/a/v1/models", headers={"x-api-key": "0123456789abcdef"}) == 200
        file.settings["api_keys"] = ["fedcba9876543210"]
        gateway.reload(file.read())
        assert await code(client, "/a/v1/models", headers={"x-api-key": "0123456789abcdef"}) == 401


async def test_what_needs_a_restart_stays(file: File) -> None:
    async with running(file) as (gateway, _):
        file.settings |= {"port": 1, "drain_timeout": 1.5, "body_timeout": 3.0}
        assert gateway.reload(file.read()).needs_restart == ("port", "drain_timeout")
        assert gateway.config.settings.port == 8099
        assert gateway.config.settings.body_timeout == 3.0


async def test_the_client_for_the_hosts_own_code(file: File) -> None:
    async with running(file) as (gateway, _):
        assert (await gateway.client("a").get("/models")).status_code == 200
        file.models["a"]["max_queue"] = 7
        gateway.reload(file.read())
        assert (await gateway.client("a").get("/models")).status_code == 200


async def test_a_gateway_that_owns_nothing_launches_nothing(tmp_path: Path) -> None:
    file = File(tmp_path)
    file.models["far"] = {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}
    async with Gateway(file.read()).run() as gateway:
        file.add("a")
        with pytest.raises(FluidMCPError, match="restart it"):
            gateway.reload(file.read())
        assert list(gateway.config.models) == ["far"]
        assert gateway._fleet is not None
        assert list(gateway._fleet.servers) == ["far"]
        with pytest.raises(ModelNotFound):
            gateway._fleet.scheduler.lease("a")


async def test_a_gateway_that_ends_changes_nothing(file: File) -> None:
    async with running(file) as (gateway, _):
        gateway.begin_shutdown()
        file.add("c")
        with pytest.raises(ShuttingDown):
            gateway.reload(file.read())


async def test_the_end_in_the_middle_of_a_change(file: File, tmp_path: Path) -> None:
    """The old server is drained still, the new one has not been started: both end, and nothing is left."""
    async with running(file) as (gateway, client):
        file.models["a"]["args"] += ["--load-time", "600"]
        gateway.reload(file.read())
        file.models["a"]["args"] += ["--ignore-sigterm"]
        gateway.reload(file.read())
        with anyio.move_on_after(0.05):
            await client.get("/a/v1/models")
    with anyio.fail_after(DEADLINE):
        async with running(file_without_load(file)) as (gateway, client):
            assert await code(client, "/a/v1/models") == 200


def file_without_load(file: File) -> File:
    file.models["a"]["args"] = file.models["a"]["args"][:7]
    return file


async def ask_forever(client: httpx.AsyncClient, name: str, codes: dict[str, list[int]]) -> None:
    while True:
        codes[name].append(await code(client, f"/{name}/v1/models"))
        await anyio.sleep(0.001)


async def reload_often(file: File, times: int, names: tuple[str, ...]) -> dict[str, list[int]]:
    codes: dict[str, list[int]] = {name: [] for name in names}
    async with running(file) as (gateway, client), anyio.create_task_group() as asking:
        pids = {name: gateway.status(name).pid for name in names}
        for name in names:
            asking.start_soon(ask_forever, client, name, codes)
        for number in range(times):
            file.models["a"]["max_queue"] = number + 1
            assert gateway.reload(file.read()).changed == ("a",)
            if number % 5:  # now and then, the next one comes while the last one is at work
                await until(lambda: gateway.status("a").state is READY)
        await until(lambda: gateway.status("a").state is READY)
        assert {name: gateway.status(name).pid for name in names} == pids
        asking.cancel_scope.cancel()
    return codes


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_fifty_reloads_under_load(file: File) -> None:
    file.add("c")
    with anyio.fail_after(500):
        codes = await reload_often(file, 50, ("b", "c"))
    for answers in codes.values():
        assert len(answers) > 100
        assert set(answers) == {200}
