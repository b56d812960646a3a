"""Leases: waiting, counting, draining."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import ModelNotFound, ModelStarting, ModelStopped, QueueTimeout, ShuttingDown
from fluidmcp_proxy.models.remote import RemoteServer
from fluidmcp_proxy.models.scheduler import Scheduler
from tests.models.doubles import ADDRESS, FakeServer, FakeTransport, model
from tests.models.virtual_time import BACKEND, VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


@pytest.fixture
async def server() -> FakeServer:
    return FakeServer(model(queue_timeout=30))


@pytest.fixture
async def scheduler(server: FakeServer) -> Scheduler:
    scheduler = Scheduler()
    scheduler.admit(server)
    return scheduler


async def test_an_unknown_model(scheduler: Scheduler) -> None:
    with pytest.raises(ModelNotFound):
        scheduler.lease("nobody")


async def test_counts(scheduler: Scheduler, server: FakeServer) -> None:
    server.become_ready()
    async with scheduler.lease("m") as transport, scheduler.lease("m"):
        assert transport is server.transport
        assert scheduler.in_flight("m") == 2
    assert scheduler.in_flight("m") == scheduler.waiting("m") == 0


async def test_entering_waits_for_the_model(scheduler: Scheduler, server: FakeServer) -> None:
    entered = anyio.Event()

    async def ask() -> None:
        async with scheduler.lease("m"):
            entered.set()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            assert (scheduler.waiting("m"), scheduler.in_flight("m")) == (1, 0)
            server.become_ready()
            await entered.wait()
    assert (scheduler.waiting("m"), scheduler.in_flight("m")) == (0, 0)


async def test_wait_0_is_answered_at_once_with_what_the_model_does(scheduler: Scheduler) -> None:
    with pytest.raises(ModelStarting, match="shard 1 of 2") as caught:
        async with scheduler.lease("m", wait=0):
            pass
    assert (b"retry-after", b"5") in caught.value.headers
    assert scheduler.waiting("m") == 0


async def test_a_preference_does_not_lengthen_the_limit() -> None:
    server, scheduler = FakeServer(model(queue_timeout=0)), Scheduler()
    scheduler.admit(server)
    with anyio.fail_after(5), pytest.raises(ModelStarting):
        async with scheduler.lease("m", wait=1000):
            pass


async def test_a_turn_that_does_not_come() -> None:
    server, scheduler = FakeServer(model(max_concurrency=1)), Scheduler()
    scheduler.admit(server)
    server.become_ready()
    async with scheduler.lease("m"):
        with pytest.raises(QueueTimeout):
            async with scheduler.lease("m", wait=0):
                pass
        assert (scheduler.in_flight("m"), scheduler.waiting("m")) == (1, 0)


async def test_a_request_that_leaves_while_it_waits_is_not_counted(scheduler: Scheduler) -> None:
    with anyio.move_on_after(0.01):
        async with scheduler.lease("m"):
            pass
    assert scheduler.waiting("m") == 0


async def test_drain_waits_for_the_last_request(scheduler: Scheduler, server: FakeServer) -> None:
    server.become_ready()
    drained = anyio.Event()

    async def drain() -> None:
        await scheduler.drain("m", timeout=30)
        drained.set()

    async with anyio.create_task_group() as tasks:
        lease = scheduler.lease("m")
        async with lease:
            tasks.start_soon(drain)
            await anyio.wait_all_tasks_blocked()
            assert not drained.is_set()
        with anyio.fail_after(5):
            await drained.wait()
    assert not lease.was_cut


async def test_drain_cuts_what_does_not_end(scheduler: Scheduler, server: FakeServer) -> None:
    server.become_ready()
    lease = scheduler.lease("m")

    async def hold() -> None:
        with anyio.CancelScope() as scope:
            lease.interrupt = scope.cancel
            async with lease:
                await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            await anyio.wait_all_tasks_blocked()
            await scheduler.drain("m", timeout=0)
    assert lease.was_cut
    assert scheduler.in_flight("m") == 0
    assert lease.shutting_down().code == "shutting_down"


class Queue:
    """A model with one place, taken by ``first``, and clients that wait for it."""

    def __init__(self, **keys: Any) -> None:
        self.scheduler = Scheduler()
        server = FakeServer(model(max_concurrency=1, **keys))
        self.scheduler.admit(server)
        server.become_ready()
        self.first = self.scheduler.lease("m")
        self.entered: list[str] = []

    async def wait(self, name: str, patience: float | None = None) -> None:
        async with self.scheduler.lease("m", wait=patience):
            self.entered.append(name)

    def counts(self) -> tuple[int, int]:
        return self.scheduler.in_flight("m"), self.scheduler.waiting("m")


async def test_a_client_that_leaves_in_the_moment_of_its_turn_hands_it_on() -> None:
    queue = Queue()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            async with queue.first:
                leaving = asyncio.ensure_future(queue.wait("leaving"))
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(queue.wait, "next")
                await anyio.wait_all_tasks_blocked()
                assert queue.counts() == (1, 2)
            assert queue.counts() == (1, 1)  # it is inside and does not know it yet
            leaving.cancel()  # as a host does; anyio would let it go on to its next wait
    assert queue.entered == ["next"]
    assert queue.counts() == (0, 0)


async def test_a_turn_that_comes_in_the_moment_the_patience_ends_is_taken() -> None:
    queue = Queue()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            async with queue.first:
                tasks.start_soon(queue.wait, "patient", 1.0)
                await anyio.wait_all_tasks_blocked()
                loop = asyncio.get_running_loop()
                assert isinstance(loop, VirtualTimeLoop)
                loop.pass_time(1.1)  # its deadline is over, and the loop has not seen it
            assert queue.counts() == (1, 0)
    assert queue.entered == ["patient"]
    assert queue.counts() == (0, 0)


async def test_a_deadline_is_kept_by_run() -> None:
    scheduler, server = Scheduler(), FakeServer(model(idle_timeout=0.05))
    scheduler.admit(server)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scheduler.run)
            await anyio.wait_all_tasks_blocked()
            server.become_ready()
            async with scheduler.lease("m"):
                await anyio.sleep(0.1)
                assert "rest" not in server.asked
            while "rest" not in server.asked:
                await anyio.sleep(0.005)
            scheduler.close()
            scheduler.close()


async def test_a_stop_that_is_not_ours_to_make_leaves_everything_as_it_was() -> None:
    config = model(command=None, args=[], endpoints={"base_url": ADDRESS.url})
    server = RemoteServer(config, ADDRESS, FakeTransport(), drain=never)
    scheduler = Scheduler()
    scheduler.admit(server)
    with pytest.raises(ModelStopped, match="not run by this gateway"):
        scheduler.stop("m")
    async with scheduler.lease("m"):
        assert scheduler.in_flight("m") == 1
    server.close()
    with pytest.raises(ShuttingDown):
        async with scheduler.lease("m"):
            pass


async def never() -> None:
    raise AssertionError
