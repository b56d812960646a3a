"""Doubles for what surrounds a supervisor: a child without a process and a transport without a wire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio

from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import GatewayError, ModelFailed
from fluidmcp_proxy.models.child import CannotStart
from fluidmcp_proxy.models.state import ModelState, ModelStatus, Phase
from fluidmcp_proxy.models.supervisor import Supervisor
from fluidmcp_proxy.upstream.client import Address, Body, Headers, Response, Sink, Transport
from fluidmcp_proxy.upstream.websocket import WebSocket
from tests.serving import DEADLINE

ADDRESS = Address("http", "127.0.0.1", 8001)


def model(**keys: Any) -> ModelConfig:
    """A model's configuration."""
    entry = {"command": "vllm", "args": ["serve", "m", "--port", "8001"], **keys}
    return parse_config({"llmModels": {"m": entry}}, environ={}).models["m"]


class FakeResponse:
    def __init__(self, status: int, content: bytes = b"{}") -> None:
        self.status = status
        self.content = content
        self.reason = b""
        self.ended = False
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    async def body(self) -> AsyncIterator[bytes]:
        yield self.content

    async def pour(self, sink: Sink) -> None:
        pass


class FakeTransport:
    """Answers with what ``status`` returns, which may raise, and ``content``."""

    def __init__(self, status: Callable[[], int] = lambda: 200, content: bytes = b"{}") -> None:
        self.status = status
        self.content = content
        self.closed = False
        self.asked: list[bytes] = []

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        self.asked.append(target)
        await anyio.lowlevel.checkpoint()
        yield FakeResponse(self.status(), self.content)

    def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AbstractAsyncContextManager[WebSocket]:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True


class FakeChild:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.address = ADDRESS
        self.listens = True
        self.refusal: CannotStart | None = None
        self._ended = anyio.Event()
        self._how = ""

    def end(self, how: str = "exited with code 1") -> None:
        self._how = how
        self._ended.set()

    async def wait(self) -> str:
        await self._ended.wait()
        return self._how

    async def listening(self) -> Address | None:
        await anyio.lowlevel.checkpoint()
        if self.refusal:
            raise self.refusal
        return ADDRESS if self.listens else None


class FakeLauncher:
    """Counts what it launched, and asserts that no two are alive at once."""

    def __init__(self, prepare: Callable[[FakeChild], None] = lambda child: None) -> None:
        self.children: list[FakeChild] = []
        self.alive = 0
        self.prepare = prepare
        self.launched = anyio.Event()
        self.sweep: anyio.Event | None = None  # leaving the scope waits for it
        self.refusal: CannotStart | None = None

    def tail(self, lines: int) -> list[str]:
        return ["last words"][:lines]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FakeChild]:
        if self.refusal:
            raise self.refusal
        assert self.alive == 0, "two trees alive"
        self.alive += 1
        child = FakeChild(1000 + len(self.children))
        self.prepare(child)
        self.children.append(child)
        launched, self.launched = self.launched, anyio.Event()
        launched.set()
        try:
            yield child
        finally:
            with anyio.CancelScope(shield=True):
                if self.sweep is not None:
                    await self.sweep.wait()
            self.alive -= 1


class FakeServer:
    """A supervisor without a loop: does what it is asked when the test says so.

    ``asked`` are the requests to it; ``ModelFailed`` is its refusal after ``fail()``.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.phase = Phase.COMING
        self.transport: Transport | None = None
        self.asked: list[str] = []
        self.failed = False
        self.spawns = 0
        self.closed = anyio.Event()
        self._tell: Callable[[], None] = lambda: None

    @property
    def status(self) -> ModelStatus:
        state = {Phase.READY: ModelState.READY, Phase.RESTING: ModelState.STOPPED, Phase.GOING: ModelState.STOPPING}
        state_now = ModelState.FAILED if self.failed else state.get(self.phase, ModelState.STARTING)
        return ModelStatus(id=self.config.id, state=state_now, since=0.0, spawns=self.spawns, progress="shard 1 of 2")

    def refusal(self) -> GatewayError | None:
        return ModelFailed("it has failed") if self.failed else None

    def observe(self, changed: Callable[[], None]) -> None:
        self._tell = changed

    def become(self, phase: Phase) -> None:
        self.phase = phase
        self.transport = FakeTransport() if phase is Phase.READY else None
        self._tell()

    def become_ready(self) -> None:
        self.spawns += 1
        self.become(Phase.READY)

    def fail(self) -> None:
        self.failed = True
        self.become(Phase.RESTING)

    def request_start(self) -> None:
        self.asked.append("start")
        self.failed = False
        if self.phase in (Phase.RESTING, Phase.GOING):
            self.become(Phase.COMING)

    def request_stop(self) -> None:
        self.asked.append("stop")
        if self.phase is not Phase.RESTING:
            self.become(Phase.GOING)

    def request_rest(self) -> None:
        self.asked.append("rest")
        self.become(Phase.GOING)

    def request_restart(self) -> None:
        self.asked.append("restart")
        self.become(Phase.COMING)

    def close(self) -> None:
        self.closed.set()
        self.become(Phase.RESTING)

    async def run(self) -> None:
        await self.closed.wait()


class Rig:
    """A supervisor among doubles, running."""

    def __init__(
        self,
        launcher: FakeLauncher | None = None,
        transport: FakeTransport | None = None,
        until_stalled: Callable[[Any], Awaitable[None]] | None = None,
        **keys: Any,
    ) -> None:
        self.launcher = launcher or FakeLauncher()
        self.transport = transport or FakeTransport()
        self.drained = 0
        self.supervisor = Supervisor(
            model(**{"restart_delay": 0, **keys}),
            self.launcher,
            connect=lambda address: self.transport,
            drain=self._drain,
            until_stalled=until_stalled,
        )

    async def _drain(self) -> None:
        self.drained += 1

    async def until(self, *states: str) -> None:
        """Wait until the model is in one of ``states``."""
        with anyio.fail_after(DEADLINE):
            await self.supervisor._until(lambda: self.supervisor.status.state in states)

    async def until_launched(self, count: int) -> FakeChild:
        """Wait for the ``count``-th launch."""
        with anyio.fail_after(DEADLINE):
            while len(self.launcher.children) < count:
                await self.launcher.launched.wait()
        return self.launcher.children[count - 1]


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    """The supervisor's loop in the background; it must end within a deadline."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.supervisor.run)
        yield rig
        rig.supervisor.close()
        with anyio.fail_after(DEADLINE):
            await rig.supervisor._until(lambda: rig.supervisor.status.state in ("stopped", "failed"))
