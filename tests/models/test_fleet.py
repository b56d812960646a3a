"""All models of a gateway with real processes: side by side, apart from each other, and gone with it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.models.fleet import Fleet, open_fleet
from fluidmcp_proxy.models.state import ModelStatus
from fluidmcp_proxy.process.owner import AlreadyOwned
from tests.process.marks import Mark, guardians, marked
from tests.serving import DEADLINE, STUB, free_port, stub

pytestmark = pytest.mark.anyio

Configure = Callable[..., GatewayConfig]


@pytest.fixture
def mark() -> Iterator[Mark]:
    with marked() as mark:
        yield mark


def entry(*arguments: str, port: int | None = None, host: str = "127.0.0.1", **keys: Any) -> dict[str, Any]:
    """A model that is the stub server with these arguments."""
    port = port or free_port()
    args = ["-S", "-E", str(STUB), "serve", "m", "--port", str(port), *arguments]
    url = f"http://{host}:{port}/v1"
    model = {"command": sys.executable, "args": args, "restart_delay": 0.01, "stop_timeout": 0.3}
    return {**model, "endpoints": {"base_url": url}, **keys}


@pytest.fixture
def configure(tmp_path: Path, mark: Mark) -> Configure:
    def make(**models: dict[str, Any]) -> GatewayConfig:
        for model in models.values():
            if "command" in model:
                model["env"] = {"FAULT_TEST": mark.value}
        gateway = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run"), "drain_timeout": 0.2}
        document = {"llmModels": models, "gateway": gateway}
        return parse_config(document, environ={"PATH": os.environ["PATH"]})

    return make


async def until(fleet: Fleet, model: str, condition: str | Callable[[ModelStatus], bool]) -> ModelStatus:
    """Wait for a state, or for a condition, of a model's status."""
    with anyio.fail_after(DEADLINE):
        while True:
            status = fleet.scheduler.statuses()[model]
            if status.state == condition if isinstance(condition, str) else condition(status):
                return status
            await anyio.sleep(0.005)


async def test_side_by_side(configure: Configure, mark: Mark) -> None:
    config = configure(one=entry("--load-time", "0.3"), two=entry("--load-time", "0.3", "--children", "1"))
    async with open_fleet(config) as fleet:
        with anyio.fail_after(DEADLINE):  # both have been started before either is ready
            while mark.count() < 3:
                await anyio.sleep(0.005)
        pids = {(await until(fleet, name, "ready")).pid for name in ("one", "two")}
        assert len(pids) == 2
        assert pids < mark.pids()
        assert len(guardians(os.getpid())) == 2
    assert not mark.pids()


async def test_one_that_fails_disturbs_no_other(configure: Configure) -> None:
    config = configure(
        good=entry(),
        missing={**entry(), "command": "/nowhere/vllm"},
        crashing=entry("--crash", "out of memory", max_restarts=1),
        slow=entry("--never-ready", startup_timeout=0.3, max_restarts=0),
    )
    async with open_fleet(config) as fleet:
        missing = await until(fleet, "missing", "failed")
        crashing = await until(fleet, "crashing", "failed")
        slow = await until(fleet, "slow", "failed")
        good = await until(fleet, "good", "ready")
    assert (missing.reason, missing.spawns) == ("command_invalid", 0)
    assert (crashing.reason, crashing.spawns) == ("exited", 2)
    assert crashing.message is not None
    assert crashing.message.endswith("out of memory")
    assert slow.reason == "startup_timeout"
    assert good.restarts == 0


async def test_a_stranger_on_the_port_gets_no_request(configure: Configure) -> None:
    with stub() as port:
        async with open_fleet(configure(m=entry(port=port, host="localhost"))) as fleet:
            status = await until(fleet, "m", "failed")
        assert (status.reason, status.spawns) == ("port_in_use", 0)
        assert status.message is not None
        assert f"port {port} (localhost) is taken" in status.message
        stats = httpx.get(f"http://127.0.0.1:{port}/stub/stats", timeout=DEADLINE).json()
    assert stats["requests"] == 2  # by this test: when it was started, and just now


async def test_a_stranger_that_comes_between_a_crash_and_the_restart(configure: Configure) -> None:
    port = free_port()
    async with open_fleet(configure(m=entry(port=port, restart_delay=1))) as fleet:
        status = await until(fleet, "m", "ready")
        assert status.pid is not None
        os.kill(status.pid, signal.SIGKILL)
        await until(fleet, "m", "backoff")
        with socket.create_server(("127.0.0.1", port)) as stranger:  # sooner than any program could listen
            status = await until(fleet, "m", "failed")
            assert (status.reason, status.spawns) == ("port_in_use", 1)
            stranger.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody has even connected
                stranger.accept()


async def test_a_child_that_listens_is_the_model_s(configure: Configure, tmp_path: Path) -> None:
    """As with a wrapper that runs ``vllm serve``."""
    model = entry()
    model |= {"command": "/bin/sh", "args": ["-c", '"$@"; exit 1', "sh", sys.executable, *model["args"]]}
    async with open_fleet(configure(m=model)) as fleet:
        await until(fleet, "m", "ready")


async def test_a_killed_head_is_replaced_and_never_doubled(configure: Configure, mark: Mark) -> None:
    async with open_fleet(configure(m=entry("--children", "2", "--ignore-sigterm"))) as fleet:
        for spawn in (1, 2):
            status = await until(fleet, "m", lambda status, spawn=spawn: status.spawns == spawn)  # type: ignore[misc]
            status = await until(fleet, "m", "ready")
            before = mark.wait_for(3)
            assert status.pid is not None
            os.kill(status.pid, signal.SIGKILL)
        status = await until(fleet, "m", lambda status: status.spawns == 3)
        assert not before & mark.pids()
        assert status.last_exit is not None
        assert status.last_exit.startswith("was killed by SIGKILL")


async def test_no_room_for_a_process_is_a_failure_like_others(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        if len(tries) < 1:
            tries.append(args)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*args)  # type: ignore[no-any-return]

    tries: list[object] = []
    real: Any = __import__("fluidmcp_proxy.process.group", fromlist=["Guard"]).Guard
    monkeypatch.setattr("fluidmcp_proxy.process.group.Guard", refuse)
    async with open_fleet(configure(m=entry())) as fleet:
        status = await until(fleet, "m", "backoff")
        assert status.reason == "no_process"
        assert status.message is not None
        assert "Resource temporarily unavailable" in status.message
        assert (await until(fleet, "m", "ready")).restarts == 1


# -- one owner


async def test_a_second_gateway_is_refused(configure: Configure, mark: Mark) -> None:
    config = configure(m=entry())
    async with open_fleet(config) as fleet:
        await until(fleet, "m", "ready")
        with pytest.raises(AlreadyOwned, match=str(os.getpid())):
            async with open_fleet(config):
                pass
        assert mark.count() == 1
    async with open_fleet(config) as fleet:
        await until(fleet, "m", "ready")


async def test_remote_models_have_no_owner(configure: Configure, tmp_path: Path) -> None:
    config = configure(m={"endpoints": {"base_url": "http://127.0.0.1:9/v1"}})
    async with open_fleet(config), open_fleet(config):
        pass
    assert not (tmp_path / "run").exists()


# -- the end


async def test_an_exception_leaves_nothing(configure: Configure, mark: Mark) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with open_fleet(configure(m=entry("--grandchild", "--ignore-sigterm"))) as fleet:
            await until(fleet, "m", "ready")
            raise ZeroDivisionError
    assert not mark.pids()


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.2])
async def test_cancelled_while_it_starts(configure: Configure, mark: Mark, delay: float) -> None:
    with anyio.move_on_after(delay):
        async with open_fleet(configure(m=entry("--grandchild", "--ignore-sigterm"))):
            await anyio.sleep_forever()
    assert not mark.pids()
    assert not guardians(os.getpid())


def test_under_the_test_client_twice(configure: Configure, mark: Mark) -> None:
    """Its event loop is not in the main thread."""
    gateway = Gateway(configure(m=entry()))
    for _ in range(2):
        with TestClient(gateway, base_url="http://localhost") as client:
            assert client.get("/m/v1/models").json()["data"][0]["id"] == "m"
            assert mark.count() == 1
        assert not mark.pids()
