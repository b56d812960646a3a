"""Who may use which model now: every request holds a lease on the model that answers it.

Counts the requests inside and those that wait, gives the way to a ready server, and drains a model before it is
stopped. It starts and stops nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import ModelNotFound, ModelStarting, QueueTimeout, ShuttingDown
from fluidmcp_proxy.models.state import ModelState, ModelStatus
from fluidmcp_proxy.upstream.client import Transport

__all__ = ["Lease", "Scheduler", "Server"]

_GIVE_UP_CUT_STREAMS = 5.0
"""Seconds that requests get to end after they were cut: they only have to tell their clients."""


class Server(Protocol):
    """A model as the scheduler sees it: launched by a supervisor, or run by somebody else."""

    @property
    def config(self) -> ModelConfig:
        """What was written about it."""

    @property
    def transport(self) -> Transport | None:
        """The way to the server while requests may go there."""

    @property
    def status(self) -> ModelStatus:
        """A snapshot."""

    async def ready(self) -> Transport:
        """Wait for the server; raises a ``GatewayError`` when waiting is in vain."""


class _Desk:
    """The counters of one model, and the leases inside."""

    __slots__ = ("emptied", "leases", "progress", "server", "waiting")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.waiting = 0
        self.progress = 0  # bytes answered and requests ended by leases that are over
        self.leases: set[Lease] = set()
        self.emptied: anyio.Event | None = None


class Lease:
    """A request's hold on a model, from before it waits for the model to the last byte: ``async with`` gives the
    transport.

    The holder sets ``interrupt``, which is called when the request is cut short because its model is being stopped, and
    counts ``bytes_answered``, by which liveness sees that the server works.
    """

    __slots__ = ("_desk", "_limit", "bytes_answered", "interrupt", "was_cut")

    def __init__(self, desk: _Desk, wait: float | None) -> None:
        self._desk = desk
        limit = desk.server.config.queue_timeout
        self._limit = limit if wait is None else min(limit, wait)
        self.interrupt: Callable[[], None] | None = None
        self.was_cut = False
        self.bytes_answered = 0

    async def __aenter__(self) -> Transport:
        desk = self._desk
        transport = desk.server.transport
        if transport is None:
            desk.waiting += 1
            try:
                transport = await self._wait()
            finally:
                desk.waiting -= 1
        desk.leases.add(self)
        return transport

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._desk.leases.discard(self)
        self._desk.progress += self.bytes_answered + 1
        if not self._desk.leases and self._desk.emptied is not None:
            self._desk.emptied.set()

    async def _wait(self) -> Transport:
        server = self._desk.server
        with anyio.move_on_after(self._limit):
            return await server.ready()
        status, name = server.status, server.config.id
        if status.state in (ModelState.STARTING, ModelState.BACKOFF):
            doing = f" ({status.progress})" if status.progress else ""
            raise ModelStarting(f"LLM model '{name}' is still loading{doing}; try again.", retry_after=5)
        raise QueueTimeout(f"No turn at LLM model '{name}' within {self._limit:g} s; try again.", retry_after=5)

    def cut(self) -> None:
        """End the request visibly, now."""
        self.was_cut = True
        if self.interrupt is not None:
            self.interrupt()

    def shutting_down(self) -> ShuttingDown:
        """What the client of a request that was cut is told."""
        return ShuttingDown(f"LLM model '{self._desk.server.config.id}' is being stopped.", retry_after=5)


class Scheduler:
    """The leases on all models of a gateway."""

    def __init__(self) -> None:
        self._desks: dict[str, _Desk] = {}

    def admit(self, server: Server) -> None:
        """Take a model in."""
        self._desks[server.config.id] = _Desk(server)

    def lease(self, model: str, *, wait: float | None = None) -> Lease:
        """A hold on ``model``, entered with ``async with``.

        ``wait`` shortens the time in seconds for which entering waits for the model, ``queue_timeout`` otherwise.

        Raises:
            ModelNotFound: there is no such model. Entering raises ``ModelStarting`` or ``QueueTimeout`` when the time
            is
                over, ``ModelFailed``, ``ModelStopped`` or ``ShuttingDown`` when waiting is in vain.
        """
        try:
            return Lease(self._desks[model], wait)
        except KeyError:
            raise ModelNotFound(f"There is no LLM model '{model}'.") from None

    def in_flight(self, model: str) -> int:
        """Requests inside the model's server."""
        return len(self._desks[model].leases)

    def progress(self, model: str) -> int:
        """A number that grows with every byte that ``model`` answers and every request that it ends."""
        desk = self._desks[model]
        return desk.progress + sum(lease.bytes_answered for lease in desk.leases)

    def waiting(self, model: str) -> int:
        """Requests that wait for the model."""
        return self._desks[model].waiting

    async def drain(self, model: str, timeout: float) -> None:
        """Wait until no request is inside ``model``; those that are after ``timeout`` seconds are cut."""
        with anyio.move_on_after(timeout):
            await self._emptied(model)
            return
        for lease in tuple(self._desks[model].leases):
            lease.cut()
        with anyio.move_on_after(_GIVE_UP_CUT_STREAMS):
            await self._emptied(model)

    async def _emptied(self, model: str) -> None:
        desk = self._desks[model]
        while desk.leases:
            desk.emptied = anyio.Event()
            await desk.emptied.wait()

    def statuses(self) -> Mapping[str, ModelStatus]:
        """A snapshot of every model."""
        return {name: desk.server.status for name, desk in self._desks.items()}
