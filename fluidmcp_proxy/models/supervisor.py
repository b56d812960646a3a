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
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import Enum, auto

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import GatewayError, ModelFailed, ShuttingDown
from fluidmcp_proxy.models.address import displayed
from fluidmcp_proxy.models.child import CannotStart, Child, Failure, Launcher
from fluidmcp_proxy.models.progress import LINES, read_progress
from fluidmcp_proxy.models.readiness import until_ready
from fluidmcp_proxy.models.restart import Restarts
from fluidmcp_proxy.models.sleep import Sleeper
from fluidmcp_proxy.models.state import ModelState, ModelStatus, Phase
from fluidmcp_proxy.process.gpu import GpuMemory
from fluidmcp_proxy.upstream.client import Address, Transport

__all__ = ["Supervisor"]

logger = logging.getLogger("fluidmcp_proxy.models")

LINES_IN_MESSAGE = 20
"""Lines of the server's output in the message of a failure: vLLM's root cause stands above its last traceback."""


class _Wish(Enum):
    """What the server is wanted to be."""

    OFF = auto()
    ASLEEP = auto()
    AWAKE = auto()


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
        sleep: Sleeper | None = None,
        memory: GpuMemory | None = None,
    ) -> None:
        self.config = config
        self.transport: Transport | None = None  # while it is ready and nobody has asked it to stop or rest
        self._launcher = launcher
        self._connect = connect
        self._drain = drain
        self._until_stalled = until_stalled
        self._sleep = sleep
        self._memory = memory
        self._status = ModelStatus(id=config.id, state=ModelState.STOPPED, since=time.time())
        self._restarts = Restarts(config.restart_policy, config.max_restarts, config.restart_delay)
        self._wish = _Wish.OFF
        self._asleep = False  # from falling asleep to waking up, or to the end without having woken up
        self._again = False  # wanted anew as soon as it is stopped
        self._closing = False
        self._transport: Transport | None = None  # the connections to the child, from ready to its end
        self._entered = 0.0  # monotonic time of the last transition
        self._ready_for = 0.0  # seconds of service before the last failure
        self._changed = anyio.Event()
        self._tell: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<Supervisor {self.config.id!r} {self._status.state} wish={self._wish.name}>"

    # What others may see

    @property
    def phase(self) -> Phase:
        """What it is up to, following at once what was asked."""
        if self.transport is not None:
            return Phase.READY
        if self._wish is _Wish.AWAKE or self._again:
            return Phase.COMING
        at_rest = self._asleep or self._status.state in (ModelState.STOPPED, ModelState.FAILED)
        return Phase.RESTING if at_rest else Phase.GOING

    @property
    def status(self) -> ModelStatus:
        """A snapshot; its ``state`` is old as soon as it is read."""
        if self._status.state is ModelState.STARTING:
            lines = self._launcher.tail(LINES)
            stage, percent = read_progress(lines)
            return replace(self._status, progress=lines[-1] if lines else None, stage=stage, percent=percent)
        return self._status

    def refusal(self) -> GatewayError | None:
        """``ShuttingDown``, or ``ModelFailed`` with the reason, while waiting is in vain."""
        if self._closing:
            return ShuttingDown("The gateway is shutting down.", retry_after=5)
        if self._status.state is ModelState.FAILED and self._wish is _Wish.OFF:
            return ModelFailed(self._status.message or f"LLM model '{self.config.id}' has failed.")
        return None

    def observe(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called after each change of the above."""
        self._tell = changed

    # What others may ask for: takes effect in run()

    def request_start(self) -> None:
        """Have the model running and awake. Leaves ``failed`` and forgets earlier restarts."""
        if self._closing:
            return
        if self._wish is _Wish.OFF and self._status.state is ModelState.STOPPING:
            self._again = True
        elif self._wish is not _Wish.AWAKE:
            if self._wish is _Wish.OFF:
                self._restarts = self._restarts.reset()
            self._wish = _Wish.AWAKE
        self._wake()

    def request_stop(self) -> None:
        """Have the model stopped, whatever it is doing now."""
        self._wish, self._again = _Wish.OFF, False
        if self._status.state is ModelState.FAILED:
            self._become(ModelState.STOPPED)
        self._wake()

    def request_rest(self) -> None:
        """Have the model put to sleep if it is ready and can sleep, else stopped."""
        if self._sleep is None or self.transport is None:
            self.request_stop()
            return
        self._wish = _Wish.ASLEEP
        self._wake()

    def request_restart(self) -> None:
        """Have the model stopped and started anew."""
        if self._closing:
            return
        if self._wish is _Wish.OFF:
            self.request_start()
        else:
            self._wish, self._again = _Wish.OFF, True
            self._wake()

    def close(self) -> None:
        """Stop for good: waiters are refused, and ``run()`` returns once the model is stopped."""
        self._closing = True
        self._wish, self._again = _Wish.OFF, False
        self._wake()

    # The loop

    async def run(self) -> None:
        """Keep the model in the wanted state until ``close()``; cancelling ends it, too, and leaves no process."""
        while not self._closing:
            await self._until(lambda: not self._is_unwanted() or self._closing)
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
        if self._is_unwanted():
            return
        while not self._is_unwanted():
            self._become(ModelState.STARTING)
            failure = await self._serve_once()
            if failure is None or self._is_unwanted():
                break
            delay = self._plan(failure)
            if delay is None:
                self._wish = _Wish.OFF
                self._become(ModelState.FAILED)
                return
            with anyio.move_on_after(delay):
                await self._until(self._is_unwanted)
        self._become_stopping()
        self._become(ModelState.STOPPED, pid=None)

    async def _serve_once(self) -> Failure | None:
        """One launch, until its tree is gone. None: it ended because it was not wanted any more."""
        failure: Failure | None = None
        if self._memory is not None:
            await self._memory.note()
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
            failure = Failure(exc.reason, str(exc), final=exc.final)
            self._record(failure)
        self._status = replace(self._status, pid=None)
        if self._memory is not None:
            await self._memory.until_back()
        return failure

    async def _watch(self, child: Child) -> Failure | None:
        """Bring the child to ready and keep it so until it ends, fails or is not wanted any more."""
        began = anyio.current_time()
        failures: list[Failure] = []

        async with anyio.create_task_group() as race:

            def lose(failure: Failure) -> None:
                failures.append(failure)
                race.cancel_scope.cancel()

            async def exits() -> None:
                how = await child.wait()
                lose(
                    Failure("exited", f"{how} after {anyio.current_time() - began:.1f} s", self._transport is not None)
                )

            async def unwanted() -> None:
                await self._until(self._is_unwanted)
                race.cancel_scope.cancel()

            race.start_soon(exits)
            race.start_soon(unwanted)
            self._transport = await self._until_ready(child, lose)
            while self._transport is not None:
                self._become(ModelState.READY)
                await self._serve(self._transport, lose)
                await self._sleep_and_wake(self._transport)

        if self._is_unwanted() or not failures:  # it may be wanted again already, but has been given up
            self._become_stopping()
            return None
        if self._status.state in (ModelState.STOPPING, ModelState.ASLEEP):
            self._lose_asleep(failures[0])
            return None
        self._record(failures[0])
        return failures[0]

    async def _until_ready(self, child: Child, lose: Callable[[Failure], None]) -> Transport | None:
        limit = self.config.startup_timeout
        try:
            with anyio.move_on_after(limit):
                return await until_ready(child.listening, self._connect, self.config.readiness_path)
        except CannotStart as exc:
            lose(Failure(exc.reason, str(exc), final=exc.final))
        else:
            lose(Failure("startup_timeout", f"not ready within startup_timeout ({limit:g} s)"))
        return None

    async def _serve(self, transport: Transport, lose: Callable[[Failure], None]) -> None:
        """Until it is wanted asleep. A stall loses the race, and being stopped cancels this."""
        async with anyio.create_task_group() as tasks:

            async def unneeded() -> None:
                await self._until(lambda: self._wish is _Wish.ASLEEP)
                tasks.cancel_scope.cancel()

            tasks.start_soon(unneeded)
            await self._stall(transport)
            lose(Failure("stalled", f"made no progress for {self.config.stall_timeout:g} s", started=True))

    async def _stall(self, transport: Transport) -> None:
        if self._until_stalled is None:
            await anyio.sleep_forever()
        else:
            await self._until_stalled(transport)

    async def _sleep_and_wake(self, transport: Transport) -> None:
        """Return awake. What cannot sleep, or not wake up, is ended, and started anew if it is wanted."""
        assert self._sleep is not None
        self._become(ModelState.STOPPING)
        await self._drain()
        if await self._sleep.fall_asleep(transport):
            if self._memory is not None:
                await self._memory.until_back(asleep=True)
            self._become(ModelState.ASLEEP)
            await self._until(lambda: self._wish is _Wish.AWAKE)
            self._become(ModelState.WAKING)
            if self._memory is not None:
                await self._memory.note()
            if await self._sleep.wake_up(transport):
                return
        logger.warning("model %s: sleep mode failed, so its server is ended instead", self.config.id)
        self._again = self._wish is _Wish.AWAKE
        self._wish = _Wish.OFF
        self._wake()
        await anyio.sleep_forever()  # until that has been noticed

    async def _withdraw(self) -> None:
        """Between ready and the end of the tree: nothing new goes to the server, what is inside may finish.

        A server that has ended by itself has cut its streams already; draining then waits for their ends only.
        """
        transport, self._transport = self._transport, None
        self._wake()
        if transport is None:
            return
        try:
            if self._is_unwanted():
                await self._drain()
        finally:
            with anyio.CancelScope(shield=True):
                await transport.aclose()

    # Bookkeeping

    def _is_unwanted(self) -> bool:
        return self._wish is _Wish.OFF

    def _plan(self, failure: Failure) -> float | None:
        """Seconds until the restart after ``failure``, or None."""
        if failure.final:
            return None
        self._restarts, delay = self._restarts.after_failure(self._ready_for)
        self._status = replace(self._status, restarts=self._restarts.count)
        if delay is not None:
            logger.info("model %s: restart %d in %g s", self.config.id, self._restarts.count, delay)
        return delay

    def _record(self, failure: Failure) -> None:
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

    def _lose_asleep(self, failure: Failure) -> None:
        """Its processes ended while it slept: nobody missed it, and it must not come back into another one's place."""
        logger.warning("model %s: %s while it was asleep", self.config.id, failure.text)
        self._status = replace(self._status, last_exit=failure.text)
        self._again = self._wish is _Wish.AWAKE
        self._wish = _Wish.OFF
        self._become_stopping()

    def _become_stopping(self) -> None:
        if self._status.state is not ModelState.STOPPING:
            self._become(ModelState.STOPPING)

    def _break_down(self, fault: Exception) -> None:
        self._wish, self._transport = _Wish.OFF, None
        name = type(fault).__name__
        message = f"LLM model '{self.config.id}' is lost by a fault of the gateway ({name}), told in its log"
        self._status = replace(self._status, state=ModelState.FAILED, since=time.time(), pid=None, message=message)
        self._wake()

    def _become(self, state: ModelState, **changes: str | float | None) -> None:
        old = self._status.state
        assert old.may_become(state), (old, state)
        if state is ModelState.READY:
            changes = {"reason": None, "message": None, "load_seconds": anyio.current_time() - self._entered}
        self._status = replace(self._status, state=state, since=time.time(), **changes)  # type: ignore[arg-type]
        self._asleep = state is ModelState.ASLEEP or (self._asleep and state is ModelState.STOPPING)
        self._entered = anyio.current_time()
        logger.info("model %s: %s", self.config.id, state)
        self._wake()

    def _wake(self) -> None:
        """Every change wakes the loop, and whoever observes; each looks for itself."""
        # Not looked up with each request: that would be most of what a lease costs.
        offered = self._status.state is ModelState.READY and self._wish is _Wish.AWAKE
        self.transport = self._transport if offered else None
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
        self._tell()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
