"""A limit on waiting that costs nothing when there is nothing to wait for.

Nearly every request is complete when its body is asked for, and a time-out around each ``receive()`` would cost 5 µs.
So on asyncio the clock starts only when the awaited thing suspends. Elsewhere, which is trio, it starts at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from types import coroutine
from typing import Any, TypeVar

import anyio

from fluidmcp_proxy.upstream.transport import is_asyncio

__all__ = ["at_most"]

T = TypeVar("T")


async def at_most(seconds: float, awaitable: Awaitable[T]) -> T:
    """What ``awaitable`` gives; raises ``TimeoutError`` when that takes longer than ``seconds``."""
    if not is_asyncio():
        with anyio.fail_after(seconds):
            return await awaitable
    steps = awaitable.__await__()
    try:
        first = next(steps)
    except StopIteration as done:
        result: T = done.value
        return result
    # Not anyio's scope: it must not be entered inside of one that the awaitable has entered and will leave.
    async with asyncio.timeout(seconds):
        return await _resume(steps, first)


@coroutine
def _resume(steps: Generator[Any, Any, T], step: object) -> Generator[Any, Any, T]:
    """Go on with ``steps``, which have got as far as ``step``: ``yield from`` for what was begun by hand."""
    while True:
        try:
            yield step
        except BaseException as error:  # a cancellation belongs to whoever waits in there
            thrown: BaseException | None = error
        else:
            thrown = None
        try:
            step = next(steps) if thrown is None else steps.throw(thrown)
        except StopIteration as done:
            result: T = done.value
            return result
