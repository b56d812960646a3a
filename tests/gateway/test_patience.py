"""A limit on waiting: on both backends, whatever is inside, whoever cancels."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.gateway.patience import at_most

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


async def value() -> str:
    return "here"


async def slow_value() -> str:
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
        with anyio.CancelScope():
            await anyio.lowlevel.checkpoint()
    return "here"


async def never() -> None:
    async with anyio.create_task_group() as tasks:  # as the receive() of Starlette's BaseHTTPMiddleware
        tasks.start_soon(anyio.sleep_forever)


async def broken() -> None:
    await anyio.lowlevel.checkpoint()
    raise ValueError("broken")


async def test_what_is_there_or_comes_in_time() -> None:
    assert await at_most(0.001, value()) == "here"
    assert await at_most(60, slow_value()) == "here"


async def test_what_does_not_come() -> None:
    with anyio.fail_after(10), pytest.raises(TimeoutError):
        await at_most(0.01, never())
    assert await at_most(60, slow_value()) == "here"


async def test_errors_pass() -> None:
    with pytest.raises(ValueError, match="broken"):
        await at_most(60, broken())


async def test_a_cancellation_from_outside_is_no_timeout() -> None:
    with anyio.move_on_after(0.01) as scope:
        await at_most(60, never())
    assert scope.cancelled_caught
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(at_most, 60, never())
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_scope_that_was_entered_before_the_wait_is_left_in_order() -> None:
    arrived = anyio.Event()

    async def inside() -> str:
        with anyio.CancelScope():
            await arrived.wait()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        return "here"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: _later(arrived))
        assert await at_most(60, inside()) == "here"


async def _later(event: anyio.Event) -> None:
    await anyio.lowlevel.checkpoint()
    event.set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_there_starts_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(asyncio, "timeout")
    assert await at_most(60, value()) == "here"
    with pytest.raises(AttributeError):
        await at_most(60, broken())
