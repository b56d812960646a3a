"""One model's server, kept in the state that is wanted of it.

The loop in ``run()`` is the sole writer of the model's status. It knows the server only as a scope that yields a
child and promises that leaving it leaves nothing; requests and restarts are asked for by synchronous methods and take
effect there.

Order of a stop: not ready (new requests wait or are refused) → drain → the child's scope is left (SIGTERM, grace,
SIGKILL, until its tree is empty) → ``stopped``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import FluidMCPError, ModelFailed, ModelStopped, ShuttingDown
from fluidmcp_proxy.models.address import displayed
from fluidmcp_proxy.models.readiness import until_ready
from fluidmcp_proxy.models.restart import Restarts
from fluidmcp_proxy.models.state import ModelState, ModelStatus
from fluidmcp_proxy.upstream.client import Address, Transport

__all__ = ["CannotStart", "Child", "Launcher", "Supervisor"]

logger = logging.getLogger("fluidmcp_proxy.models")

LINES_IN_MESSAGE = 20
"""Lines of the server's output in the message of a failure: vLLM's root cause stands above its last traceback."""


class CannotStart(FluidMCPError):
    """A start that failed; a ``final`` one would fail again: no such command, or somebody else listens on the port.

    ``reason`` is a word for a program, the exception's text a sentence for a person.
    """

    def __init__(self, reason: str, message: str, *, final: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.final = final


class Child(Protocol):
    """A server that was launched and not ended yet."""

    @property
    def pid(self) -> int | None:
        """Its first process, where there is one on this machine."""

    @property
    def address(self) -> Address:
        """Where it is to listen."""

    async def wait(self) -> str:
        """Return when it has ended, with a phrase that says how: ``exited with code 1``."""

    async def listening(self) -> Address | None:
        """Where it listens, verified to be itself; None while it does not yet.

        Raises:
            CannotStart: somebody else listens there.
        """


class Launcher(Protocol):
    """How a model's server comes to life."""

    def open(self) -> AbstractAsyncContextManager[Child]:
        """A scope with the server in it; leaving the scope leaves no process. May raise ``CannotStart``."""

    def tail(self, lines: int) -> Sequence[str]:
        """The last lines of its output, secrets redacted."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a server is not there: ``text`` is a phrase, ``final`` means that trying again is pointless."""

    reason: str
    text: str
    started: bool = False
    final: bool = False


class Supervisor:
    """Starts, watches, restarts and stops the server of one model."""

    def __init__(
        self,
        config: ModelConfig,
        launcher: Launcher,
        *,
        connect: Callable[[Address], Transport],
        drain: Callable[[], Awaitable[None]],
        until_stalled: Callable[[Transport], Awaitable[None]] | None = None,
    ) -> None:
        self.config = config
        self.transport: Transport | None = None  # present exactly while ready
        self._launcher = launcher
        self._connect = connect
        self._drain = drain
        self._until_stalled = until_stalled
        self._status = ModelStatus(id=config.id, state=ModelState.STOPPED, since=time.time())
        self._restarts = Restarts(config.restart_policy, config.max_restarts, config.restart_delay)
        self._wanted = False
        self._again = False  # wanted anew as soon as it is stopped
        self._closing = False
        self._entered = 0.0  # monotonic time of the last transition
        self._ready_for = 0.0  # seconds of service before the last failure
        self._changed = anyio.Event()

    def __repr__(self) -> str:
        return f"<Supervisor {self.config.id!r} {self._status.state} wanted={self._wanted}>"

    # What others may ask for: takes effect in run()

    @property
    def status(self) -> ModelStatus:
        """A snapshot; its ``state`` is old as soon as it is read."""
        if self._status.state is ModelState.STARTING:
            last = self._launcher.tail(1)
            return replace(self._status, progress=last[0] if last else None)
        return self._status

    def request_start(self) -> None:
        """Have the model running. Leaves ``failed`` and forgets earlier restarts."""
        if self._closing:
            return
        if self._status.state is ModelState.STOPPING:
            self._again = True
        elif not self._wanted:
            self._wanted = True
            self._restarts = self._restarts.reset()
        self._wake()

    def request_stop(self) -> None:
        """Have the model stopped, whatever it is doing now."""
        self._wanted = self._again = False
        if self._status.state is ModelState.FAILED:
            self._become(ModelState.STOPPED)
        self._wake()

    def request_restart(self) -> None:
        """Have the model stopped and started anew."""
        if self._closing:
            return
        if self._wanted:
            self._wanted, self._again = False, True
            self._wake()
        else:
            self.request_start()

    def close(self) -> None:
        """Stop for good: waiters are refused, and ``run()`` returns once the model is stopped."""
        self._closing = True
        self._wanted = self._again = False
        self._wake()

    async def ready(self) -> Transport:
        """Wait until the model is ready and return the way to it.

        Raises:
            ModelFailed: it does not start; the message says why.
            ModelStopped: it was stopped on purpose.
            ShuttingDown: the gateway is ending.
        """
        while self.transport is None:
            self._refuse_if_hopeless()
            await self._changed.wait()
        return self.transport

    def _refuse_if_hopeless(self) -> None:
        if self._closing:
            raise ShuttingDown("The gateway is shutting down.", retry_after=5)
        if self._status.state is ModelState.FAILED:
            raise ModelFailed(self._status.message or f"LLM model '{self.config.id}' has failed.")
        if not self._wanted and not self._again:
            raise ModelStopped(f"LLM model '{self.config.id}' is stopped; it has to be started again by hand.")

    # The loop

    async def run(self) -> None:
        """Keep the model in the wanted state until ``close()``; cancelling ends it, too, and leaves no process."""
        while not self._closing:
            await self._until(lambda: self._wanted or self._closing)
            try:
                await self._live()
            except Exception as exc:  # the boundary between models: a fault of ours in one costs no other
                logger.exception("model %s: the supervisor has failed", self.config.id)
                self._break_down(exc)
            if self._again:
                self._again = False
                self.request_start()

    async def _live(self) -> None:
        """From wanted to stopped or failed."""
        if not self._wanted:
            return
        while self._wanted:
            self._become(ModelState.STARTING)
            failure = await self._serve_once()
            if failure is None:
                break
            delay = self._plan(failure)
            if delay is None:
                self._wanted = False
                self._become(ModelState.FAILED)
                return
            with anyio.move_on_after(delay):
                await self._until(lambda: not self._wanted)
        if self._status.state is not ModelState.STOPPING:
            self._become(ModelState.STOPPING)
        self._become(ModelState.STOPPED, pid=None)

    async def _serve_once(self) -> _Failure | None:
        """One launch, until its tree is gone. None: it ended because it was not wanted any more."""
        failure: _Failure | None = None
        try:
            async with self._launcher.open() as child:
                self._status = replace(
                    self._status, pid=child.pid, address=displayed(child.address), spawns=self._status.spawns + 1
                )
                logger.info("model %s: started, pid %s", self.config.id, child.pid)
                try:
                    failure = await self._watch(child)
                finally:
                    await self._withdraw()
        except CannotStart as exc:
            failure = _Failure(exc.reason, str(exc), final=exc.final)
            self._record(failure)
        self._status = replace(self._status, pid=None)
        return failure

    async def _watch(self, child: Child) -> _Failure | None:
        """Bring the child to ready and keep it so until it ends, fails or is not wanted any more."""
        began = anyio.current_time()
        failures: list[_Failure] = []

        async with anyio.create_task_group() as race:

            def lose(failure: _Failure) -> None:
                failures.append(failure)
                race.cancel_scope.cancel()

            async def exits() -> None:
                how = await child.wait()
                lose(
                    _Failure("exited", f"{how} after {anyio.current_time() - began:.1f} s", self.transport is not None)
                )

            async def unwanted() -> None:
                await self._until(lambda: not self._wanted)
                race.cancel_scope.cancel()

            race.start_soon(exits)
            race.start_soon(unwanted)
            transport = await self._until_ready(child, lose)
            if transport is not None:
                self.transport = transport
                self._become(ModelState.READY)
                await self._stall(transport)
                lose(_Failure("stalled", f"made no progress for {self.config.stall_timeout:g} s", started=True))

        if not self._wanted or not failures:  # it may be wanted again already, but has been given up
            self._become(ModelState.STOPPING)
            return None
        self._record(failures[0])
        return failures[0]

    async def _until_ready(self, child: Child, lose: Callable[[_Failure], None]) -> Transport | None:
        limit = self.config.startup_timeout
        try:
            with anyio.move_on_after(limit):
                return await until_ready(child.listening, self._connect, self.config.readiness_path)
        except CannotStart as exc:
            lose(_Failure(exc.reason, str(exc), final=True))
        else:
            lose(_Failure("startup_timeout", f"not ready within startup_timeout ({limit:g} s)"))
        return None

    async def _stall(self, transport: Transport) -> None:
        if self._until_stalled is None:
            await anyio.sleep_forever()
        else:
            await self._until_stalled(transport)

    async def _withdraw(self) -> None:
        """Between ready and the end of the tree: nothing new goes to the server, what is inside may finish.

        A server that has ended by itself has cut its streams already; draining then waits for their ends only.
        """
        transport, self.transport = self.transport, None
        self._wake()
        if transport is None:
            return
        try:
            if not self._wanted:
                await self._drain()
        finally:
            with anyio.CancelScope(shield=True):
                await transport.aclose()

    # Bookkeeping

    def _plan(self, failure: _Failure) -> float | None:
        """Seconds until the restart after ``failure``, or None."""
        if failure.final:
            return None
        self._restarts, delay = self._restarts.after_failure(self._ready_for)
        self._status = replace(self._status, restarts=self._restarts.count)
        if delay is not None:
            logger.info("model %s: restart %d in %g s", self.config.id, self._restarts.count, delay)
        return delay

    def _record(self, failure: _Failure) -> None:
        """Write down why the server is gone; from here on it is not ready."""
        name = self.config.id
        head = (
            f"LLM model '{name}' {failure.text}"
            if failure.started
            else f"Failed to start LLM model '{name}': {failure.text}"
        )
        lines = () if failure.final else self._launcher.tail(LINES_IN_MESSAGE)
        message = "\n".join([head, *lines])
        logger.error("%s", message)
        self._ready_for = anyio.current_time() - self._entered if self._status.state is ModelState.READY else 0.0
        last_exit = failure.text if failure.reason == "exited" else self._status.last_exit
        self._become(ModelState.BACKOFF, reason=failure.reason, message=message, last_exit=last_exit)

    def _break_down(self, fault: Exception) -> None:
        self._wanted, self.transport = False, None
        name = type(fault).__name__
        message = f"LLM model '{self.config.id}' is lost by a fault of the gateway ({name}), told in its log"
        self._status = replace(self._status, state=ModelState.FAILED, since=time.time(), pid=None, message=message)
        self._wake()

    def _become(self, state: ModelState, **changes: str | int | None) -> None:
        old = self._status.state
        assert old.may_become(state), (old, state)
        if state is ModelState.READY:
            changes = {"reason": None, "message": None}
        self._status = replace(self._status, state=state, since=time.time(), **changes)  # type: ignore[arg-type]
        self._entered = anyio.current_time()
        logger.info("model %s: %s", self.config.id, state)
        self._wake()

    def _wake(self) -> None:
        """Every change wakes every waiter; each looks for itself."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
