"""A thousand requests to twenty models in four groups, with clients that leave and servers that die: real supervisors
over servers without processes, in virtual time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.models.desk import Slot
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import Phase
from fluidmcp_proxy.models.supervisor import Supervisor
from fluidmcp_proxy.models.turns import TURN_SECONDS
from fluidmcp_proxy.upstream.client import Address, Transport
from tests.models.doubles import ADDRESS, FakeChild, FakeLauncher, FakeTransport, model
from tests.models.virtual_time import BACKEND

pytestmark = pytest.mark.anyio

GROUPS, MODELS, REQUESTS = 4, 20, 1000
LOAD, UNLOAD, SLEEP = 60.0, 5.0, 0.5


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


class SlowLauncher(FakeLauncher):
    """Takes its time to load and to end."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FakeChild]:
        async with super().open() as child:
            child.listens = False
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._load, child)
                try:
                    yield child
                finally:
                    tasks.cancel_scope.cancel()
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(UNLOAD)

    async def _load(self, child: FakeChild) -> None:
        await anyio.sleep(LOAD)
        child.listens = True


class SlowSleep:
    """Fails now and then."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def fall_asleep(self, transport: Transport) -> bool:
        await anyio.sleep(SLEEP)
        return self._chance.random() > 0.05

    wake_up = fall_asleep


class Storm:
    def __init__(self, seed: int, **keys: Any) -> None:
        self.chance = random.Random(seed)
        self.scheduler = Scheduler()
        self.launchers: dict[str, SlowLauncher] = {}
        self.supervisors: dict[str, Supervisor] = {}
        self.groups: dict[str, list[str]] = {}
        self.outcomes: Counter[str] = Counter()
        self.turns: dict[str, list[str]] = {}  # by group: the models that requests entered, in order, repeats left out
        for number in range(MODELS):
            self._add(f"m{number}", f"g{number % GROUPS}", keys)

    def _add(self, name: str, group: str, keys: dict[str, Any]) -> None:
        limit = self.chance.choice([None, 1, 4])
        wanted = {"group": group, "max_concurrency": limit, "idle_timeout": self.chance.choice([None, 30]), **keys}
        config = model(restart_delay=0.1, queue_timeout=36_000, **wanted).model_copy(update={"id": name})
        launcher = self.launchers[name] = SlowLauncher()
        sleep = SlowSleep(self.chance) if self.chance.random() < 0.5 else None
        drain = partial(self.scheduler.drain, name, 30)
        supervisor = Supervisor(config, launcher, connect=self._connect, drain=drain, sleep=sleep)
        self.supervisors[name] = supervisor
        self.scheduler.admit(supervisor)
        self.groups.setdefault(group, []).append(name)

    def _connect(self, address: Address) -> Transport:
        assert address == ADDRESS
        return FakeTransport()

    async def request(self, name: str, patience: float) -> None:
        outcome = "left"
        with anyio.move_on_after(patience):
            try:
                async with self.scheduler.lease(name) as transport:
                    self._check_alone(name)
                    assert not isinstance(transport, FakeTransport) or not transport.closed
                    outcome = "left inside"
                    await anyio.sleep(self.chance.expovariate(1 / 2))
                    outcome = "served"
            except GatewayError as error:
                outcome = error.code
        self.outcomes[outcome] += 1

    def _check_alone(self, name: str) -> None:
        group = self.supervisors[name].config.group
        assert group is not None
        awake = [other for other in self.groups[group] if self.supervisors[other].phase is not Phase.RESTING]
        assert awake == [name]
        turns = self.turns.setdefault(group, [])
        if not turns or turns[-1] != name:
            turns.append(name)

    async def kill_some(self) -> None:
        while True:
            await anyio.sleep(self.chance.uniform(5, 60))
            alive = [launcher for launcher in self.launchers.values() if launcher.alive]
            if alive:
                self.chance.choice(alive).children[-1].end()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.scheduler.run)
            for supervisor in self.supervisors.values():
                tasks.start_soon(supervisor.run)
            yield
            self.scheduler.close()
            for supervisor in self.supervisors.values():
                supervisor.close()

    def slots(self) -> set[Slot]:
        return {self.scheduler._desks[name].slot for name in self.supervisors}


@pytest.mark.parametrize("seed", range(20))
async def test_everyone_gets_a_turn_and_all_counters_return_to_0(seed: int) -> None:
    storm = Storm(seed)
    with anyio.fail_after(10 * 3600):  # of virtual time
        async with storm.running():
            async with anyio.create_task_group() as killing:
                killing.start_soon(storm.kill_some)
                async with anyio.create_task_group() as clients:
                    for _ in range(REQUESTS):
                        name = f"m{storm.chance.randrange(MODELS)}"
                        patience = storm.chance.choice([0, 1, 30, 100, 36_000, 36_000, 36_000])
                        clients.start_soon(storm.request, name, patience)
                        await anyio.sleep(storm.chance.expovariate(5))
                killing.cancel_scope.cancel()
            for name in storm.supervisors:
                assert storm.scheduler.in_flight(name) == storm.scheduler.waiting(name) == 0
            assert not any(slot.line for slot in storm.slots())
    assert sum(storm.outcomes.values()) == REQUESTS
    assert storm.outcomes["served"] > REQUESTS / 3
    assert set(storm.outcomes) <= {"served", "left", "left inside", "model_failed"}
    assert not any(launcher.alive for launcher in storm.launchers.values())


async def test_swaps_are_no_more_than_fairness_needs() -> None:
    """Eight clients ask two models in turn, each as soon as it is answered, for half an hour."""
    storm = Storm(0, max_concurrency=None, idle_timeout=None)
    waits: list[float] = []

    async def client() -> None:
        while True:
            for name in ("m0", "m4"):  # of one group
                began = anyio.current_time()
                await storm.request(name, 36_000)
                waits.append(anyio.current_time() - began)

    seconds = 1800.0
    async with storm.running(), anyio.create_task_group() as clients:
        for _ in range(8):
            clients.start_soon(client)
        await anyio.sleep(seconds)
        clients.cancel_scope.cancel()
    swaps = len(storm.turns["g0"]) - 1
    assert storm.outcomes["served"] >= 8 * (swaps - 1)  # each swap lets everyone in
    assert swaps <= seconds / UNLOAD
    # While others wait: a turn, then its last requests, then the swap; and once more the same before one's own turn.
    assert max(waits) <= 2 * (TURN_SECONDS + 30 + UNLOAD + LOAD)


async def test_nobody_starves_beside_a_model_that_is_never_without_requests() -> None:
    storm = Storm(1, max_concurrency=4, idle_timeout=None)
    waits: list[float] = []

    async def busy() -> None:
        while True:
            await storm.request("m0", 36_000)

    async with storm.running(), anyio.create_task_group() as clients:
        for _ in range(100):
            clients.start_soon(busy)
        await anyio.sleep(2 * LOAD)
        for name in ("m4", "m8", "m12", "m16") * 3:
            began = anyio.current_time()
            await storm.request(name, 36_000)
            waits.append(anyio.current_time() - began)
        clients.cancel_scope.cancel()
    assert max(waits) <= 2 * (TURN_SECONDS + 30 + UNLOAD + LOAD)
