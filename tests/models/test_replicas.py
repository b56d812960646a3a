"""Several servers of one model as one, among doubles: what it shows, and what it asks of them and when."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import ModelFailed
from fluidmcp_proxy.models.pool import Pool, Replica
from fluidmcp_proxy.models.replicas import ReplicaSet
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import ModelState, Phase
from tests.models.doubles import ADDRESS, FakeServer, model
from tests.models.virtual_time import BACKEND

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


class Rig:
    """A set of doubles; each replica's id is that of the set and its number."""

    def __init__(self, count: int = 3, **keys: Any) -> None:
        self.config = model(**keys)
        self.servers = [FakeServer(self.config.model_copy(update={"id": f"m.{number}"})) for number in range(count)]
        replicas = [Replica(ADDRESS) for _ in self.servers]
        for replica, server in zip(replicas, self.servers, strict=True):
            replica.server = server
        self.replicas = replicas
        self.set = ReplicaSet(self.config, replicas, Pool(self.config, replicas))
        self.told = 0
        self.set.observe(self._count)

    def _count(self) -> None:
        self.told += 1

    def become(self, *phases: Phase) -> None:
        for server, phase in zip(self.servers, phases, strict=True):
            server.become(phase)

    @property
    def asked(self) -> list[list[str]]:
        return [server.asked for server in self.servers]


R, C, G, S = Phase.RESTING, Phase.COMING, Phase.GOING, Phase.READY


@pytest.mark.parametrize(
    ("phases", "phase", "state"),
    [
        ((R, R, R), R, "stopped"),
        ((R, C, G), C, "starting"),
        ((R, R, G), G, "stopping"),
        ((C, C, S), S, "ready"),
        ((G, R, S), S, "ready"),
    ],
)
def test_it_is_what_its_best_replica_is(phases: tuple[Phase, ...], phase: Phase, state: str) -> None:
    rig = Rig()
    told = rig.told
    rig.become(*phases)
    assert rig.told == told + 3
    assert rig.set.phase is phase
    assert (rig.set.transport is not None) is (phase is S)
    status = rig.set.status
    assert (status.id, status.state) == ("m", state)
    assert [each.id for each in status.replicas] == ["m.0", "m.1", "m.2"]
    assert [each.in_flight for each in status.replicas] == [0, 0, 0]


def test_waiting_is_in_vain_when_it_is_for_all() -> None:
    rig = Rig(2)
    rig.servers[0].fail()
    assert rig.set.refusal() is None
    rig.servers[1].fail()
    assert isinstance(rig.set.refusal(), ModelFailed)
    assert rig.set.status.state is ModelState.FAILED


def test_one_that_has_failed_is_seen_beside_one_that_is_ready() -> None:
    rig = Rig(2)
    rig.servers[0].fail()
    rig.servers[1].become_ready()
    status = rig.set.status
    assert status.state is ModelState.READY
    assert [each.state for each in status.replicas] == [ModelState.FAILED, ModelState.READY]
    assert status.spawns == 1


@pytest.mark.parametrize("what", ["start", "stop", "rest"])
def test_what_is_asked_is_asked_of_all(what: str) -> None:
    rig = Rig()
    getattr(rig.set, f"request_{what}")()
    assert rig.asked == [[what]] * 3


async def test_the_scheduler_takes_it_for_a_server() -> None:
    rig = Rig(2)
    scheduler = Scheduler()
    scheduler.admit(rig.set)
    rig.become(R, R)
    entered: list[str] = []

    async def use() -> None:
        async with scheduler.lease("m"):
            entered.append("in")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use)
        await anyio.wait_all_tasks_blocked()
        assert rig.asked == [["start"], ["start"]]
        assert not entered
        rig.servers[1].become_ready()
        await anyio.wait_all_tasks_blocked()
        assert entered == ["in"]
        tasks.cancel_scope.cancel()


# Restarting


async def test_restarts_come_one_after_the_other() -> None:
    rig = Rig()
    rig.become(S, S, S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.set.run)
        rig.set.request_restart()
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            assert rig.asked == [["restart"]] * (number + 1) + [[]] * (2 - number)
            assert rig.set.phase is S
            rig.servers[number].become_ready()
        await anyio.wait_all_tasks_blocked()
        assert rig.asked == [["restart"]] * 3
        rig.set.request_restart()  # it can be asked again
        await anyio.wait_all_tasks_blocked()
        assert rig.asked == [["restart", "restart"], ["restart"], ["restart"]]
        rig.set.close()


async def test_what_does_not_serve_is_restarted_first() -> None:
    rig = Rig()
    rig.become(S, C, S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.set.run)
        rig.set.request_restart()
        await anyio.wait_all_tasks_blocked()
        assert rig.asked == [[], ["restart"], []]
        rig.set.close()


async def test_while_none_serves_all_are_restarted_at_once() -> None:
    rig = Rig()
    rig.become(C, C, R)
    rig.set.request_restart()
    assert rig.asked == [["restart"]] * 3


async def test_one_that_does_not_come_back_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.become(S, S, S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.set.run)
        with caplog.at_level(logging.WARNING):
            rig.set.request_restart()
            await anyio.wait_all_tasks_blocked()
            rig.servers[0].fail()
            await anyio.wait_all_tasks_blocked()
        assert rig.asked == [["restart"], [], []]
        assert rig.set.phase is S
        assert "m.0 has not come back" in caplog.text
        rig.set.close()


@pytest.mark.parametrize("what", ["stop", "rest"])
async def test_a_stop_ends_it(what: str) -> None:
    rig = Rig(2)
    rig.become(S, S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.set.run)
        rig.set.request_restart()
        await anyio.wait_all_tasks_blocked()
        getattr(rig.set, f"request_{what}")()
        rig.become(R, R)
        await anyio.wait_all_tasks_blocked()
        assert rig.asked == [["restart", what], [what]]
        rig.set.close()


async def test_a_stop_before_it_has_begun() -> None:
    rig = Rig(2)
    rig.become(S, S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.set.run)
        rig.set.request_restart()
        rig.set.request_stop()
        await anyio.wait_all_tasks_blocked()
        assert rig.asked == [["stop"], ["stop"]]
        rig.set.close()


async def test_closing_ends_its_loop() -> None:
    rig = Rig(2)
    rig.become(S, S)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.set.run)
            rig.set.request_restart()
            await anyio.wait_all_tasks_blocked()
            rig.set.close()
    assert repr(rig.set) == "<ReplicaSet 'm' ['stopped', 'stopped']>"
