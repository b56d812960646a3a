"""Who may use which model now: every request holds a lease on the model that answers it.

Owns the counts of the requests inside and waiting, the queues, the turns of the groups and the time of the last use.
What follows from them is decided in ``turns``; the scheduler does it by asking the servers, which act in their own
loops and tell when something has changed. Nothing is awaited between a change and the decisions that follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import inf

import anyio

from fluidmcp_proxy.config.options import Start
from fluidmcp_proxy.errors import (
    GatewayError,
    ModelFailed,
    ModelNotFound,
    ModelStarting,
    ModelStopped,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from fluidmcp_proxy.models.desk import Desk, Slot, shares_a_slot
from fluidmcp_proxy.models.lease import Lease
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import ModelState, ModelStatus, Phase
from fluidmcp_proxy.models.turns import Ask, deadlines, line_up, may_enter, next_ask

__all__ = ["Lease", "Scheduler", "Server", "drain"]

_GIVE_UP_CUT_STREAMS = 5.0
"""Seconds that requests get to end after they were cut: they only have to tell their clients."""

_TRY_AGAIN = 5
"""Seconds after which a client whose patience is over should ask again."""

_PROMISE = 15.0
"""Seconds for which a load goes on for a client that was told to ask again, although nobody waits for it now."""

_FAILURE_LASTS = 60.0
"""Seconds after which a request starts a model on demand again that has failed."""


class Scheduler:
    """The leases on all models of a gateway."""

    def __init__(self, clock: Callable[[], float] = anyio.current_time) -> None:
        self._clock = clock
        self._desks: dict[str, Desk] = {}
        self._groups: dict[str, Slot] = {}
        self._attending: set[Slot] = set()
        self._alarm: anyio.CancelScope | None = None
        self._closed = False

    def admit(self, server: Server) -> Desk:
        """Take a model in."""
        config = server.config
        slot = self._groups.setdefault(config.group, Slot()) if config.group and shares_a_slot(config) else Slot()
        desk = self._desks[config.id] = Desk(server, slot)
        desk.kept = config.start is Start.EAGER
        server.observe(partial(self._attend, slot))
        return desk

    def retire(self, model: str) -> Desk:
        """Take a model out. Requests that wait for it are refused; those inside are its server's to drain.

        It keeps its group's slot until its server, which is to be closed now, holds nothing any more.
        """
        desk = self._desks.pop(model)
        desk.retired, desk.kept = True, False
        self._attend(desk.slot)
        return desk

    def forget(self, desk: Desk) -> None:
        """The server of a model that was retired is gone."""
        slot = desk.slot
        slot.desks.remove(desk)
        slot.line.pop(desk, None)
        if slot.holder is desk:
            slot.holder = None
        self._attend(slot)

    def arrange(self, models: Iterable[str]) -> None:
        """Have ``statuses()`` in the order of ``models``, which are all there are."""
        self._desks = {name: self._desks[name] for name in models}

    async def run(self) -> None:
        """Decide again whenever time alone has changed something, until ``close()``."""
        while not self._closed:
            now = self._clock()
            slots = {desk.slot for desk in self._desks.values()}
            due = min((time for slot in slots for time in deadlines(slot, now)), default=inf)
            with anyio.CancelScope(deadline=due) as self._alarm:
                await anyio.sleep_forever()
            self.look_again()

    def look_again(self) -> None:
        """Decide what follows from the time being another one."""
        for slot in {desk.slot for desk in self._desks.values()}:
            self._attend(slot)

    def close(self) -> None:
        """End ``run()``: nothing is started or put away any more because of the time."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()

    # For people

    def start(self, model: str) -> None:
        """Have ``model`` started, as soon as its group has room. Forgets that it has failed or was stopped."""
        desk = self._desks[model]
        desk.asked = desk.kept = desk.forgiven = True
        desk.barred = False
        self._attend(desk.slot)

    def stop(self, model: str) -> None:
        """Have ``model`` stopped until ``start``; requests to it are refused."""
        desk = self._desks[model]
        desk.barred = True
        try:
            desk.server.request_stop()
        except ModelStopped:  # it is not ours to stop
            desk.barred = False
            raise
        desk.kept = False
        self._attend(desk.slot)

    def restart(self, model: str) -> None:
        """Have ``model`` stopped and started anew, or started if it does not run."""
        desk = self._desks[model]
        if desk.phase is Phase.RESTING:
            self.start(model)
        else:
            desk.barred = False
            desk.kept = True
            desk.server.request_restart()

    # For requests

    def lease(self, model: str, *, wait: float | None = None) -> Lease:
        """A hold on ``model``, entered with ``async with``.

        ``wait`` shortens the time in seconds for which entering waits for the model, ``queue_timeout`` otherwise.

        Raises:
            ModelNotFound: there is no such model. Entering raises ``QueueFull`` when too many wait already,
            ``ModelStarting`` or ``QueueTimeout`` when the time is over, ``ModelFailed``, ``ModelStopped`` or
            ``ShuttingDown`` when waiting is in vain.
        """
        try:
            return Lease(self, self._desks[model], wait)
        except KeyError:
            raise ModelNotFound(f"There is no LLM model '{model}'.") from None

    def arrive(self, lease: Lease, desk: Desk) -> None:
        """Let ``lease`` in, or put it into the queue. Raises what entering a lease raises before any waiting."""
        now = self._clock()
        if desk.failed_since is not None and now - desk.failed_since >= _FAILURE_LASTS:
            desk.forgiven = desk.server.config.start is Start.ON_DEMAND or not desk.kept
        if refusal := self._refusal(desk):
            raise refusal
        if not desk.queue and may_enter(desk, now):
            self._enter(desk, lease)
            return
        if len(desk.queue) >= desk.max_queue:
            waiting = len(desk.queue)
            message = f"{waiting} requests wait for LLM model '{desk.name}' already; try again later."
            raise QueueFull(message, retry_after=desk.pace.seconds_for(waiting + 1))
        desk.queue[lease] = None
        self._attend(desk.slot)

    def left(self, desk: Desk) -> None:
        """A request has left the model's server."""
        if desk.attentive:
            now = self._clock()
            if desk.limit is not None:
                desk.pace.ended(now, busy=bool(desk.queue))
            if not desk.inside:
                desk.idle_since = now
            if desk.gated:
                self._attend(desk.slot)
            else:
                self._set_alarm(desk.slot, now)
        self._tell_emptied(desk)

    def give_up(self, lease: Lease, desk: Desk) -> None:
        """``lease`` does not want its turn any more, whether it had it or not: the next one may have it."""
        desk.queue.pop(lease, None)
        desk.inside.discard(lease)
        self._attend(desk.slot)
        self._tell_emptied(desk)

    def out_of_patience(self, desk: Desk, seconds: float) -> GatewayError:
        """What a client is told whose turn did not come in time. It may come back, so a load goes on for a while."""
        if desk.phase is not Phase.READY:
            desk.promised_until = self._clock() + _PROMISE
        if desk.phase is not Phase.COMING:
            message = f"No turn at LLM model '{desk.name}' within {seconds:g} s; try again."
            return QueueTimeout(message, retry_after=_TRY_AGAIN)
        progress = desk.server.status.progress
        doing = f" ({progress})" if progress else ""
        return ModelStarting(f"LLM model '{desk.name}' is still loading{doing}; try again.", retry_after=_TRY_AGAIN)

    # What is known

    def in_flight(self, model: str) -> int:
        """Requests inside the model's server."""
        return len(self._desks[model].inside)

    def unanswered(self, model: str) -> int:
        """Those of them that the server owes an answer."""
        return sum(lease.owes_answer for lease in self._desks[model].inside)

    def waiting(self, model: str) -> int:
        """Requests that wait for the model."""
        return len(self._desks[model].queue)

    def progress(self, model: str) -> int:
        """A number that grows with every byte that ``model`` answers and every request that it ends."""
        desk = self._desks[model]
        return desk.progress + sum(lease.bytes_answered for lease in desk.inside)

    def chunks(self, model: str) -> int:
        """In how many pieces the answers to the requests inside have come so far."""
        return sum(lease.chunks_answered for lease in self._desks[model].inside)

    def statuses(self) -> Mapping[str, ModelStatus]:
        """A snapshot of every model."""
        return {name: desk.server.status for name, desk in self._desks.items()}

    def missing(self) -> list[str]:
        """The eager models that are not ready, although nobody has stopped them or put them away on purpose."""
        return [
            name
            for name, desk in self._desks.items()
            if desk.kept
            and desk.server.config.start is Start.EAGER
            and desk.server.status.state is not ModelState.READY
        ]

    async def drain(self, model: str, timeout: float) -> None:
        """Wait until no request is inside ``model``; those that are after ``timeout`` seconds are cut."""
        await drain(self._desks[model], timeout)

    def _tell_emptied(self, desk: Desk) -> None:
        if not desk.inside and desk.emptied is not None:
            emptied, desk.emptied = desk.emptied, None
            emptied.set()

    # Deciding

    def _attend(self, slot: Slot) -> None:
        """See what has changed around ``slot``, let in or turn away who waits, and ask of the servers what follows.

        Asking changes things, too, and calls this again: the outer call goes on until nothing follows any more.
        """
        if slot in self._attending:
            return
        self._attending.add(slot)
        try:
            while self._attend_once(slot):
                pass
        finally:
            self._attending.discard(slot)
        self._set_alarm(slot, self._clock())

    def _set_alarm(self, slot: Slot, now: float) -> None:
        """Never later than it is: it may be meant for another slot."""
        if self._alarm is not None and (due := min(deadlines(slot, now), default=inf)) < self._alarm.deadline:
            self._alarm.deadline = due

    def _attend_once(self, slot: Slot) -> bool:
        now = self._clock()
        for desk in slot.desks:
            self._look(desk, now)
        line_up(slot, now)
        holder = slot.holder
        if holder is None:
            return False
        while holder.queue and may_enter(holder, now):
            lease = next(iter(holder.queue))
            del holder.queue[lease]
            self._enter(holder, lease)
        ask = next_ask(slot, now)
        return ask is not None and self._ask(holder, ask)

    def _look(self, desk: Desk, now: float) -> None:
        phase = desk.server.phase
        if phase is Phase.READY:
            desk.asked = False
            if desk.phase is not Phase.READY:
                desk.kept, desk.idle_since = True, now
        if phase is not Phase.RESTING:
            desk.forgiven = False
        desk.phase = phase
        failing = isinstance(desk.server.refusal(), ModelFailed)
        desk.failed_since = (now if desk.failed_since is None else desk.failed_since) if failing else None
        if self._refusal(desk) is not None:
            desk.asked, desk.promised_until = False, -inf
            waiting, desk.queue = desk.queue, {}
            for lease in waiting:  # each its own: a traceback belongs to one request
                lease.call(refusal=self._refusal(desk))

    def _refusal(self, desk: Desk) -> GatewayError | None:
        if desk.retired:
            return ShuttingDown(f"LLM model '{desk.name}' is being replaced; try again.", retry_after=_TRY_AGAIN)
        if desk.barred:
            return ModelStopped(f"LLM model '{desk.name}' is stopped; it has to be started again by hand.")
        refusal = desk.server.refusal()
        return None if desk.forgiven and isinstance(refusal, ModelFailed) else refusal

    def _enter(self, desk: Desk, lease: Lease) -> None:
        transport = desk.server.transport
        assert transport is not None, desk
        desk.promised_until = -inf
        desk.inside.add(lease)
        desk.slot.served += 1
        lease.call(transport=transport)

    def _ask(self, desk: Desk, ask: Ask) -> bool:
        """Whether asking has changed anything."""
        before = desk.server.phase
        if ask is Ask.START:
            desk.server.request_start()
        else:
            desk.kept = False
            desk.server.request_stop() if ask is Ask.STOP else desk.server.request_rest()
        return desk.server.phase is not before


async def drain(desk: Desk, timeout: float) -> None:
    """Wait until no request is inside; those that are after ``timeout`` seconds are cut."""
    with anyio.move_on_after(timeout):
        await _emptied(desk)
        return
    for lease in tuple(desk.inside):
        lease.cut()
    with anyio.move_on_after(_GIVE_UP_CUT_STREAMS):
        await _emptied(desk)


async def _emptied(desk: Desk) -> None:
    while desk.inside:
        desk.emptied = desk.emptied or anyio.Event()
        await desk.emptied.wait()
