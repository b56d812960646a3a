"""A model's life, driven event by event."""

from __future__ import annotations

import itertools
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import ModelFailed, ShuttingDown, UpstreamUnavailable
from fluidmcp_proxy.models.child import CannotStart
from fluidmcp_proxy.models.state import Phase
from fluidmcp_proxy.process.gpu import GpuMemory
from tests.models.doubles import FakeChild, FakeLauncher, FakeTransport, Rig, running
from tests.models.virtual_time import BACKEND
from tests.serving import DEADLINE

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


async def test_started_it_becomes_ready() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        assert rig.supervisor.transport is rig.transport
        status = rig.supervisor.status
        assert (status.state, status.pid, status.restarts, status.spawns) == ("ready", 1000, 0, 1)


async def test_readiness_waits_for_the_listener_before_it_sends_anything() -> None:
    launcher = FakeLauncher(lambda child: setattr(child, "listens", False))
    async with running(Rig(launcher)) as rig:
        rig.supervisor.request_start()
        child = await rig.until_launched(1)
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        assert rig.transport.asked == []
        child.listens = True
        await rig.until("ready")
        assert rig.transport.asked == [b"/health"]


async def test_readiness_is_polled_until_200() -> None:
    def status() -> int:
        answers.append(len(answers))
        if len(answers) == 1:
            raise UpstreamUnavailable("refused")
        return 503 if len(answers) < 3 else 200

    answers: list[int] = []
    async with running(Rig(transport=FakeTransport(status))) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
    assert len(answers) == 3
    assert rig.transport.closed


async def test_there_is_a_way_to_it_exactly_while_it_is_ready_and_wanted() -> None:
    launcher = FakeLauncher(lambda child: setattr(child, "listens", False))
    async with running(Rig(launcher)) as rig:
        supervisor = rig.supervisor
        assert (supervisor.transport, supervisor.phase) == (None, Phase.RESTING)
        supervisor.request_start()
        assert (supervisor.transport, supervisor.phase) == (None, Phase.COMING)
        (await rig.until_launched(1)).listens = True
        await rig.until("ready")
        assert (supervisor.transport, supervisor.phase) == (rig.transport, Phase.READY)
        supervisor.request_stop()  # the loop has not seen it yet
        assert (supervisor.transport, supervisor.phase) == (None, Phase.GOING)
        await rig.until("stopping", "stopped")
        supervisor.request_start()
        assert (supervisor.transport, supervisor.phase) == (None, Phase.COMING)


async def test_every_change_is_told() -> None:
    rig = Rig()
    seen: list[Phase] = []
    rig.supervisor.observe(lambda: seen.append(rig.supervisor.phase))
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_stop()
        await rig.until("stopped")
    assert [phase for phase, _ in itertools.groupby(seen)] == [
        Phase.COMING,
        Phase.READY,
        Phase.GOING,
        Phase.RESTING,
    ]


async def test_exits_are_followed_by_restarts_until_there_are_too_many() -> None:
    async with running(Rig(FakeLauncher(lambda child: child.end()), max_restarts=3)) as rig:
        rig.supervisor.request_start()
        await rig.until("failed")
        status = rig.supervisor.status
        assert len(rig.launcher.children) == 4
        assert (status.reason, status.restarts, status.pid) == ("exited", 3, None)
        assert status.message is not None
        assert status.message.startswith("Failed to start LLM model 'm': exited with code 1 after 0.0 s\n")
        assert status.message.endswith("\nlast words")
        refusal = rig.supervisor.refusal()
        assert isinstance(refusal, ModelFailed)
        assert "exited with code 1" in refusal.message


async def test_an_exit_with_code_0_that_nobody_asked_for_is_a_failure() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.launcher.children[0].end("exited with code 0")
        await rig.until_launched(2)
        await rig.until("ready")
        assert rig.supervisor.status.last_exit is not None
        assert "code 0" in rig.supervisor.status.last_exit
        assert rig.supervisor.status.restarts == 1


async def test_restart_policy_no() -> None:
    async with running(Rig(restart_policy="no")) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.launcher.children[0].end()
        await rig.until("failed")
        assert len(rig.launcher.children) == 1
        assert str(rig.supervisor.status.message).startswith("LLM model 'm' exited with code 1")


async def test_a_crash_is_not_ready_at_once_and_not_restarted_before_the_tree_is_gone() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.launcher.sweep = anyio.Event()
        rig.launcher.children[0].end()
        await rig.until("backoff")
        assert rig.supervisor.transport is None
        await anyio.lowlevel.checkpoint()
        assert rig.launcher.alive == 1
        rig.launcher.sweep.set()
        rig.launcher.sweep = None
        await rig.until_launched(2)  # FakeLauncher asserts that the first is gone
        await rig.until("ready")


async def test_startup_timeout() -> None:
    launcher = FakeLauncher(lambda child: setattr(child, "listens", False))
    async with running(Rig(launcher, startup_timeout=0.01, max_restarts=1)) as rig:
        rig.supervisor.request_start()
        await rig.until("failed")
        assert len(rig.launcher.children) == 2
        assert rig.supervisor.status.reason == "startup_timeout"
        assert "not ready within startup_timeout (0.01 s)" in str(rig.supervisor.status.message)


async def test_a_command_that_cannot_run_fails_at_once() -> None:
    launcher = FakeLauncher()
    launcher.refusal = CannotStart("command_invalid", "command 'vllm' not found on PATH")
    async with running(Rig(launcher)) as rig:
        rig.supervisor.request_start()
        await rig.until("failed")
        assert rig.supervisor.status.message == ("Failed to start LLM model 'm': command 'vllm' not found on PATH")
        launcher.refusal = None
        rig.supervisor.request_start()
        await rig.until("ready")
        assert rig.supervisor.status.message is None


async def test_a_stranger_on_the_port_fails_at_once_and_is_sent_nothing() -> None:
    def prepare(child: FakeChild) -> None:
        child.refusal = CannotStart("port_in_use", "port 8001 is taken")

    async with running(Rig(FakeLauncher(prepare))) as rig:
        rig.supervisor.request_start()
        await rig.until("failed")
        assert rig.supervisor.status.reason == "port_in_use"
        assert len(rig.launcher.children) == 1
        assert rig.transport.asked == []


@pytest.mark.parametrize("state", ["starting", "ready", "backoff", "failed"])
async def test_stop_works_in_every_state(state: str) -> None:
    prepare = {
        "starting": lambda child: setattr(child, "listens", False),
        "ready": lambda child: None,
        "backoff": lambda child: child.end(),
        "failed": lambda child: child.end(),
    }[state]
    keys = {"restart_delay": 60} if state == "backoff" else {"restart_policy": "no"}
    async with running(Rig(FakeLauncher(prepare), **keys)) as rig:
        rig.supervisor.request_start()
        await rig.until_launched(1)
        await rig.until(state)
        rig.supervisor.request_stop()
        await rig.until("stopped")
        assert rig.launcher.alive == 0
        assert rig.supervisor.phase is Phase.RESTING
        rig.launcher.prepare = lambda child: None
        rig.supervisor.request_start()
        await rig.until("ready")


async def test_a_stop_drains_before_the_child_is_ended() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_stop()
        await rig.until("stopped")
        assert rig.drained == 1
        assert rig.transport.closed


async def test_stopped_means_that_the_tree_is_gone() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.launcher.sweep = anyio.Event()
        rig.supervisor.request_stop()
        await rig.until("stopping")
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert rig.supervisor.status.state == "stopping"
        rig.launcher.sweep.set()
        await rig.until("stopped")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_stopped_means_that_its_gpu_memory_is_back() -> None:
    """It is read in a thread, hence the real clock."""

    def read() -> dict[str, int]:
        reads.append(used)
        return {"GPU-1": used}

    used, reads = 0, list[int]()
    rig = Rig()
    rig.supervisor._memory = GpuMemory(read)
    async with running(rig):
        rig.supervisor.request_start()
        await rig.until("ready")
        assert len(reads) == 1
        used = 70 * 1024**3
        rig.supervisor.request_stop()
        await rig.until("stopping")
        with anyio.fail_after(DEADLINE):
            while len(reads) < 3:
                await anyio.sleep(0.01)
        assert rig.launcher.alive == 0
        assert rig.supervisor.status.state == "stopping"
        used = 0
        await rig.until("stopped")


async def test_a_start_while_stopping_waits_for_the_stop() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        sweep = rig.launcher.sweep = anyio.Event()
        rig.supervisor.request_stop()
        await rig.until("stopping")
        rig.supervisor.request_start()
        rig.launcher.sweep = None
        sweep.set()
        await rig.until_launched(2)
        await rig.until("ready")


@pytest.mark.parametrize("turns", range(6))
async def test_a_start_at_any_moment_after_a_stop(turns: int) -> None:
    """Also before the loop has noticed the stop, and while it gives the child up."""
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_stop()
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        rig.supervisor.request_start()
        await anyio.wait_all_tasks_blocked()
        await rig.until("ready")
        assert rig.supervisor.status.reason is None


async def test_restart() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        rig.supervisor.request_restart()
        await rig.until_launched(2)
        await rig.until("ready")
        assert rig.supervisor.status.spawns == 2


async def test_the_end_of_the_gateway_is_a_refusal_and_no_start_revokes_it() -> None:
    async with running(Rig()) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        assert rig.supervisor.refusal() is None
        rig.supervisor.close()
        assert isinstance(rig.supervisor.refusal(), ShuttingDown)
        rig.supervisor.request_start()
        await rig.until("stopped")


async def test_cancelling_leaves_no_child() -> None:
    rig = Rig()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.supervisor.run)
        rig.supervisor.request_start()
        await rig.until("ready")
        tasks.cancel_scope.cancel()
    assert rig.launcher.alive == 0
    assert rig.transport.closed


async def test_a_fault_of_ours_fails_the_model_only() -> None:
    def prepare(child: FakeChild) -> None:
        raise ZeroDivisionError

    async with running(Rig(FakeLauncher(prepare))) as rig:
        rig.supervisor.request_start()
        await rig.until("failed")
        assert "ZeroDivisionError" in str(rig.supervisor.status.message)
        assert isinstance(rig.supervisor.refusal(), ModelFailed)


async def test_progress_is_what_the_server_said_last_while_it_loads() -> None:
    launcher = FakeLauncher(lambda child: setattr(child, "listens", False))
    async with running(Rig(launcher)) as rig:
        rig.supervisor.request_start()
        await rig.until_launched(1)
        assert rig.supervisor.status.progress == "last words"
        assert "m" in repr(rig.supervisor)
        launcher.children[0].listens = True
        await rig.until("ready")
        assert rig.supervisor.status.progress is None
