"""A block that ends early when its client leaves or somebody interrupts it: the race around every request.

On asyncio it is built like ``asyncio.timeout``, because a task group around each request costs more than forwarding it.
Its watch begins only when the block lasts: most small requests are over by then and pay for an entry in a set, since
one timer serves all of them. Elsewhere, which is trio, it is anyio's task group.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import copy_context
from types import TracebackType
from typing import Protocol

import anyio
from anyio.abc import TaskGroup

from fluidmcp_proxy.errors import ungrouped
from fluidmcp_proxy.upstream.transport import is_asyncio

__all__ = ["Race", "race_departure"]

_WATCH_AFTER = 0.1
"""Seconds until a client is watched, or twice as many. That it has left has to be noticed within a second."""

_Left = Callable[[], Awaitable[None]]


class Race(AbstractAsyncContextManager[None], Protocol):
    """The block, entered with ``async with``; one that ended early is left without an exception.

    Leaving raises what ``client_left`` raised.
    """

    def interrupt(self) -> None:
        """End the block now; to be called from outside of it, and without effect before and after."""


def race_departure(client_left: _Left) -> Race:
    """A block that ends when ``client_left()`` returns."""
    return _AsyncioRace(client_left) if is_asyncio() else _AnyioRace(client_left)


class _Clock:
    """The timer of all races of one event loop. It ticks while there are any."""

    __slots__ = ("_new", "_old", "_ticks", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._new: set[_AsyncioRace] = set()  # since the last tick
        self._old: set[_AsyncioRace] = set()  # since the one before
        self._ticks = False

    def enter(self, race: _AsyncioRace) -> None:
        self._new.add(race)
        if not self._ticks:
            self._ticks = True
            self.loop.call_later(_WATCH_AFTER, self._tick)

    def leave(self, race: _AsyncioRace) -> None:
        self._new.discard(race)
        self._old.discard(race)

    def _tick(self) -> None:
        lasting, self._old, self._new = self._old, self._new, set()
        for race in lasting:
            race.begin_to_watch()
        self._ticks = bool(self._old)
        if self._ticks:
            self.loop.call_later(_WATCH_AFTER, self._tick)


class _Clocks(threading.local):
    """An event loop is one thread's, so a thread has one clock at a time."""

    last: _Clock | None = None

    def of(self, loop: asyncio.AbstractEventLoop) -> _Clock:
        clock = self.last
        if clock is None or clock.loop is not loop:
            clock = self.last = _Clock(loop)
        return clock


_clocks = _Clocks()


class _AsyncioRace:
    __slots__ = ("_cancelling", "_clock", "_context", "_interrupted", "_left", "_task", "_watch")

    def __init__(self, client_left: _Left) -> None:
        self._left = client_left
        self._task: asyncio.Task[object] | None = None
        self._interrupted = False
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = self._task = asyncio.current_task(loop)
        assert task is not None
        self._cancelling = task.cancelling()
        self._context = copy_context()  # the tick comes from another one
        self._clock = _clocks.of(loop)
        self._clock.enter(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        self._clock.leave(self)
        ours = False
        if self._interrupted:
            assert task is not None
            # Whoever else cancelled this task meanwhile gets his cancellation, as with asyncio.timeout.
            ours = task.uncancel() <= self._cancelling and kind is asyncio.CancelledError
        if self._watch is not None:
            self._watch.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((self._watch,))
            if not self._watch.cancelled():
                self._watch.result()  # raises what the server's receive() has raised
        return ours

    def interrupt(self) -> None:
        if self._task is not None and not self._interrupted:
            self._interrupted = True
            self._task.cancel()

    def begin_to_watch(self) -> None:
        self._watch = self._clock.loop.create_task(self._until_left(), context=self._context)

    async def _until_left(self) -> None:
        try:
            await self._left()
        finally:
            self.interrupt()


class _AnyioRace:
    __slots__ = ("_left", "_tasks")

    def __init__(self, client_left: _Left) -> None:
        self._left = client_left
        self._tasks: TaskGroup = anyio.create_task_group()

    async def __aenter__(self) -> None:
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._until_left)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._tasks.cancel_scope.cancel()
        with ungrouped():
            return bool(await self._tasks.__aexit__(kind, error, trace))

    def interrupt(self) -> None:
        self._tasks.cancel_scope.cancel()

    async def _until_left(self) -> None:
        await self._left()
        self.interrupt()
