"""An asyncio loop whose clock stands still, and jumps to the next timer when nothing else is to be done.

Hours of waiting pass in no time, and a machine that is busy for seconds costs none. For tests whose other ends are on
the same loop, sockets included.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

_SECOND_LOOK = 0.02
"""Real seconds in which what one socket has sent is surely seen at the other."""


class _Jumping(selectors.DefaultSelector):
    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)  # only a thread can go on from here
        ready = super().select(0)
        if not ready and timeout and len(self.get_map()) > 1:  # more than the loop's own, so there are sockets
            ready = super().select(_SECOND_LOOK)
        if not ready:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def pass_time(self, seconds: float) -> None:
        """As when this loop, or its machine, does not come to look for so long."""
        self._jumping.now += seconds

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Without its time-out: threads live in real time."""
        await super().shutdown_default_executor()


BACKEND: tuple[str, dict[str, Any]] = ("asyncio", {"loop_factory": VirtualTimeLoop})
"""For ``anyio_backend``."""
