"""Sleep instead of stop: the stub's sleep mode over a real connection, and a supervisor among doubles."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.models.fleet import Fleet, open_fleet
from fluidmcp_proxy.models.sleep import SleepMode
from fluidmcp_proxy.models.state import Phase
from fluidmcp_proxy.upstream.client import Address, Transport, open_transport
from tests.models.doubles import FakeTransport, Rig, running
from tests.process.marks import Mark, marked
from tests.serving import DEADLINE, STUB, free_port, stub

pytestmark = pytest.mark.anyio


# The routes


@asynccontextmanager
async def sleeper(
    *arguments: str, level: int = 1, limit: float = DEADLINE
) -> AsyncIterator[tuple[SleepMode, Transport]]:
    with stub("--enable-sleep-mode", *arguments) as port:
        address = Address("http", "127.0.0.1", port)
        transport = open_transport(address)
        yield SleepMode(address, level, limit), transport
        await transport.aclose()


@pytest.fixture(autouse=True)
def _development_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")


async def chat(port: int) -> str:
    async with httpx.AsyncClient(timeout=DEADLINE) as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        answer = await client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text


@pytest.mark.parametrize("level", [1, 2])
async def test_asleep_and_awake_again_with_its_weights(level: int) -> None:
    async with sleeper(level=level) as (mode, transport):
        before = await chat(mode.address.port)
        assert await mode.fall_asleep(transport)
        with anyio.move_on_after(0.05) as waiting:
            await chat(mode.address.port)
        assert waiting.cancelled_caught
        assert await mode.wake_up(transport)
        assert await chat(mode.address.port) == before


@pytest.mark.parametrize("fails", ["sleep", "lie", "hang"])
async def test_what_does_not_fall_asleep(fails: str) -> None:
    async with sleeper("--sleep-fails", fails, limit=0.3 if fails == "hang" else DEADLINE) as (mode, transport):
        assert not await mode.fall_asleep(transport)


async def test_what_does_not_wake_up() -> None:
    async with sleeper("--sleep-fails", "wake_up") as (mode, transport):
        assert await mode.fall_asleep(transport)
        assert not await mode.wake_up(transport)


async def test_a_server_that_is_gone() -> None:
    address = Address("http", "127.0.0.1", free_port())
    transport = open_transport(address)
    assert not await SleepMode(address, 1).fall_asleep(transport)
    await transport.aclose()


@pytest.mark.parametrize("content", [b"", b"yes", b"{}", b"[]"])
async def test_a_server_that_answers_something_else(content: bytes) -> None:
    transport = FakeTransport(content=content)
    assert not await SleepMode(Address("http", "127.0.0.1", 1), 1).fall_asleep(transport)


async def test_a_vllm_without_its_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE")
    async with sleeper() as (mode, transport):
        assert not await mode.fall_asleep(transport)


# The supervisor


class FakeSleep:
    """Sleeps and wakes as ``succeeds`` says, when ``go`` is set."""

    def __init__(self, *succeeds: bool) -> None:
        self.go = anyio.Event()
        self._succeeds = iter(succeeds)

    async def fall_asleep(self, transport: Transport) -> bool:
        await self.go.wait()
        return next(self._succeeds, True)

    wake_up = fall_asleep


def drowsy(*succeeds: bool, held: bool = False, **keys: Any) -> tuple[Rig, FakeSleep]:
    sleep = FakeSleep(*succeeds)
    if not held:
        sleep.go.set()
    rig = Rig(**keys)
    rig.supervisor._sleep = sleep
    return rig, sleep


async def test_a_rest_is_a_sleep_and_a_start_wakes() -> None:
    rig, _ = drowsy()
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        assert (rig.supervisor.transport, rig.supervisor.phase) == (None, Phase.GOING)
        await rig.until("asleep")
        assert (rig.drained, rig.supervisor.phase, rig.supervisor.status.pid) == (1, Phase.RESTING, 1000)
        rig.supervisor.request_start()
        assert rig.supervisor.phase is Phase.COMING
        await rig.until("ready")
        assert rig.supervisor.transport is rig.transport
        assert len(rig.launcher.children) == 1


async def test_what_cannot_sleep_rests_by_stopping() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("stopped")


async def test_a_sleep_that_fails_is_a_stop() -> None:
    rig, _ = drowsy(False)
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("stopped")
        assert rig.supervisor.phase is Phase.RESTING
        rig.supervisor.request_start()
        await rig.until_launched(2)
        await rig.until("ready")


async def test_a_wake_that_fails_is_a_restart() -> None:
    rig, _ = drowsy(True, False)
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("asleep")
        rig.supervisor.request_start()
        await rig.until_launched(2)
        await rig.until("ready")
        assert rig.supervisor.status.restarts == 0


@pytest.mark.parametrize("succeeds", [True, False])
async def test_wanted_again_while_it_falls_asleep(succeeds: bool) -> None:
    rig, sleep = drowsy(succeeds, held=True)
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("stopping")
        rig.supervisor.request_start()
        assert rig.supervisor.phase is Phase.COMING
        sleep.go.set()
        await rig.until("ready")
        assert len(rig.launcher.children) == (1 if succeeds else 2)


async def test_wanted_again_before_the_loop_has_seen_it() -> None:
    rig, _ = drowsy()
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        rig.supervisor.request_start()
        assert rig.supervisor.phase is Phase.READY


@pytest.mark.parametrize("state", ["stopping", "asleep", "waking"])
async def test_a_stop_in_any_moment_of_a_sleep(state: str) -> None:
    rig, sleep = drowsy(held=state == "stopping")
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("stopping" if state == "stopping" else "asleep")
        if state == "waking":
            sleep.go = anyio.Event()
            rig.supervisor.request_start()
            await rig.until("waking")
        rig.supervisor.request_stop()
        await rig.until("stopped")
        assert rig.launcher.alive == 0


async def test_a_death_in_its_sleep_is_not_followed_by_a_start() -> None:
    rig, _ = drowsy()
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("asleep")
        rig.launcher.children[0].end("was killed by SIGKILL")
        await rig.until("stopped")
        assert len(rig.launcher.children) == 1
        assert "SIGKILL" in str(rig.supervisor.status.last_exit)
        rig.supervisor.request_start()
        await rig.until("ready")


@pytest.mark.parametrize("state", ["stopping", "waking"])
async def test_a_death_while_it_is_wanted_is(state: str) -> None:
    rig, sleep = drowsy(held=state == "stopping")
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("stopping" if state == "stopping" else "asleep")
        sleep.go = anyio.Event()
        rig.supervisor.request_start()
        await rig.until(state)
        rig.launcher.children[0].end()
        await rig.until_launched(2)
        await rig.until("ready")


async def test_cancelled_in_its_sleep_it_leaves_nothing() -> None:
    rig, _ = drowsy()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.supervisor.run)
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("asleep")
        tasks.cancel_scope.cancel()
    assert rig.launcher.alive == 0
    assert rig.transport.closed


async def test_a_stall_is_looked_for_after_waking_too() -> None:
    looked: list[FakeTransport] = []

    async def until_stalled(transport: FakeTransport) -> None:
        looked.append(transport)
        await anyio.sleep_forever()

    rig, _ = drowsy(until_stalled=until_stalled)
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_rest()
        await rig.until("asleep")
        rig.supervisor.request_start()
        await rig.until("ready")
        assert len(looked) == 2


# All together, with real processes


@pytest.fixture
def mark() -> Iterator[Mark]:
    with marked() as mark:
        yield mark


@asynccontextmanager
async def two_in_a_group(tmp_path: Path, mark: Mark, *arguments: str, **keys: Any) -> AsyncIterator[Fleet]:
    models: dict[str, Any] = {}
    for name in ("a", "b"):
        args = ["-S", "-E", str(STUB), "serve", name, "--port", str(free_port()), "--enable-sleep-mode", *arguments]
        models[name] = {"command": sys.executable, "args": args, "group": "g", "sleep": 2, "stop_timeout": 1}
        models[name] |= {"env": {"FAULT_TEST": mark.value}, **keys}
    gateway = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run"), "drain_timeout": 0.2}
    config = parse_config({"llmModels": models, "gateway": gateway}, environ={"PATH": os.environ["PATH"]})
    async with open_fleet(config) as fleet:
        yield fleet


async def visit(fleet: Fleet, name: str) -> None:
    with anyio.fail_after(DEADLINE):
        async with fleet.scheduler.lease(name) as transport:
            assert fleet.scheduler.statuses()[name].state == "ready"
            async with transport.exchange(b"GET", b"/v1/models", [(b"host", b"x")]) as answer:
                assert f'"id": "{name}"'.encode() in b"".join([chunk async for chunk in answer.body])
            (other,) = {"a", "b"} - {name}
            assert fleet.scheduler.statuses()[other].state in ("asleep", "stopped")


async def test_two_that_take_turns_sleep_and_wake(tmp_path: Path, mark: Mark) -> None:
    async with two_in_a_group(tmp_path, mark) as fleet:
        for name in ("a", "b", "a", "b", "a"):
            await visit(fleet, name)
        assert [fleet.scheduler.statuses()[name].spawns for name in ("a", "b")] == [1, 1]
    assert not mark.pids()


async def test_two_that_cannot_sleep_take_turns_all_the_same(tmp_path: Path, mark: Mark) -> None:
    async with two_in_a_group(tmp_path, mark, "--sleep-fails", "sleep") as fleet:
        for name in ("a", "b", "a"):
            await visit(fleet, name)
        assert fleet.scheduler.statuses()["a"].spawns == 2
    assert not mark.pids()
