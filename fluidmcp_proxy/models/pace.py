"""How fast a model with a limit ends its requests, for the advice to come back later: arithmetic without a clock."""

from __future__ import annotations

import math

__all__ = ["Pace"]

_UNKNOWN = 5
_SHORTEST, _LONGEST = 1, 120
# OpenAI's clients obey a Retry-After of up to two minutes, and do not try again at all above it.
_WEIGHT = 0.2


class Pace:
    """The average time between the ends of two requests while others waited, the last ones counting most."""

    __slots__ = ("_gap", "_last")

    def __init__(self) -> None:
        self._gap: float | None = None
        self._last: float | None = None

    def ended(self, now: float, *, busy: bool) -> None:
        """A request has ended at ``now`` seconds; ``busy``: another one waits for its place.

        Without one the next end may be long in coming, which says nothing about the server.
        """
        if self._last is not None:
            gap = now - self._last
            self._gap = gap if self._gap is None else self._gap + _WEIGHT * (gap - self._gap)
        self._last = now if busy else None

    def seconds_for(self, requests: int) -> int:
        """How long ``requests`` ends will take, from 1 to 120 seconds."""
        if self._gap is None:
            return _UNKNOWN
        return min(_LONGEST, max(_SHORTEST, math.ceil(self._gap * requests)))
