"""One request's hold on a model, and how it waits for it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

import anyio

from fluidmcp_proxy.errors import GatewayError, ShuttingDown
from fluidmcp_proxy.models.desk import Desk
from fluidmcp_proxy.models.state import ModelStatus
from fluidmcp_proxy.upstream.client import Transport

if TYPE_CHECKING:
    from fluidmcp_proxy.models.scheduler import Scheduler

__all__ = ["Lease"]


class Lease:
    """A request's hold on a model, from before it waits for the model to the last byte: ``async with`` gives the
    transport.

    The holder sets ``interrupt``, which is called when the request is cut short because its model is being stopped, and
    counts what is answered, by which liveness sees that the server works. It clears ``owes_answer`` for a conversation,
    in which the server's silence says nothing: it may be the client's turn. ``waited`` is for how many seconds it was
    in the queue, ``first_byte_at`` the ``perf_counter`` of the first byte.
    """

    __slots__ = (
        "_called",
        "_desk",
        "_limit",
        "_scheduler",
        "bytes_answered",
        "chunks_answered",
        "first_byte_at",
        "interrupt",
        "owes_answer",
        "refusal",
        "transport",
        "waited",
        "was_cut",
    )

    def __init__(self, scheduler: Scheduler, desk: Desk, wait: float | None) -> None:
        self._scheduler = scheduler
        self._desk = desk
        limit = desk.server.config.queue_timeout
        self._limit = limit if wait is None else min(limit, wait)
        self._called: anyio.Event | None = None
        self.transport: Transport | None = None
        self.refusal: GatewayError | None = None
        self.interrupt: Callable[[], None] | None = None
        self.was_cut = False
        self.owes_answer = True
        self.bytes_answered = 0
        self.chunks_answered = 0
        self.first_byte_at: float | None = None
        self.waited = 0.0

    async def __aenter__(self) -> Transport:
        desk = self._desk
        if not desk.gated and (transport := desk.server.transport) is not None:
            desk.inside.add(self)
            return transport
        return await self._take_turn()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        desk = self._desk
        desk.inside.discard(self)
        desk.progress += self.bytes_answered + 1
        if desk.attentive or desk.emptied is not None:
            self._scheduler.left(desk)

    async def _take_turn(self) -> Transport:
        """Enter at once or wait in the queue; whatever happens meanwhile, afterwards this is inside or nowhere."""
        scheduler, desk = self._scheduler, self._desk
        self._forget()
        scheduler.arrive(self, desk)
        began = perf_counter()
        try:
            if self.transport is None and self.refusal is None:
                self._called = anyio.Event()
                with anyio.move_on_after(self._limit):
                    await self._called.wait()
            if self.transport is not None:
                return self.transport
            raise self.refusal or scheduler.out_of_patience(desk, self._limit)
        except BaseException:
            scheduler.give_up(self, desk)
            raise
        finally:
            self.waited += perf_counter() - began

    @property
    def status(self) -> ModelStatus:
        """A snapshot of the model, of which the configuration may know nothing any more."""
        return self._desk.server.status

    def _forget(self) -> None:
        """It may be entered again, after a connect that failed."""
        self.transport = self.refusal = self._called = None

    def count(self, size: int) -> None:
        """A piece of the answer has come, of ``size`` bytes."""
        if self.first_byte_at is None:
            self.first_byte_at = perf_counter()
        self.bytes_answered += size
        self.chunks_answered += 1

    def call(self, *, transport: Transport | None = None, refusal: GatewayError | None = None) -> None:
        """It is this one's turn, or waiting is in vain."""
        self.transport, self.refusal = transport, refusal
        if self._called is not None:
            self._called.set()

    def cut(self) -> None:
        """End the request visibly, now."""
        self.was_cut = True
        if self.interrupt is not None:
            self.interrupt()

    def shutting_down(self) -> ShuttingDown:
        """What the client of a request that was cut is told."""
        return ShuttingDown(f"LLM model '{self._desk.name}' is being stopped.", retry_after=5)
