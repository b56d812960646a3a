"""A moment that is moved with every request and seldom reached, for the price of an addition.

A timer of the event loop costs a microsecond or two to set and to cancel. This one stays where it is while the moment
moves away from it, and looks what has become of that when it fires.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

__all__ = ["Deadline"]


class Deadline:
    """Calls ``reached`` when the time is over that was set last, unless that was lifted."""

    __slots__ = ("_due", "_loop", "_reached", "_timer", "_timer_due")

    def __init__(self, loop: asyncio.AbstractEventLoop, reached: Callable[[], None]) -> None:
        self._loop = loop
        self._reached = reached
        self._due = inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = inf

    def set(self, seconds: float) -> None:
        """In so many seconds, whatever was set before."""
        self._due = self._loop.time() + seconds
        if self._due < self._timer_due:
            self._arm(seconds)

    def lift(self) -> None:
        """Not at all, until it is set again."""
        self._due = inf

    def cancel(self) -> None:
        """Lift it and let go of the timer."""
        self._due = self._timer_due = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = self._due
        self._timer = self._loop.call_later(seconds, self._fired)

    def _fired(self) -> None:
        self._timer, self._timer_due = None, inf
        if self._due == inf:
            return
        left = self._due - self._loop.time()
        if left > 0:
            self._arm(left)
        else:
            self._due = inf
            self._reached()
