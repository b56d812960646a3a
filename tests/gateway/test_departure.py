"""The race around every request: on asyncio by the task's own cancellation, on trio by a task group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest

from fluidmcp_proxy.gateway.departure import race_departure
from tests.serving import DEADLINE

BACKENDS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
pytestmark = pytest.mark.anyio


async def stays() -> None:
    await anyio.sleep_forever()


async def leaves() -> None:
    """A client that is gone already."""


@BACKENDS
async def test_a_client_that_leaves_ends_the_block() -> None:
    with anyio.fail_after(DEADLINE):
        async with race_departure(leaves):
            await anyio.sleep_forever()
        await anyio.sleep(0)  # no cancellation is left over


@BACKENDS
async def test_a_block_that_ends_first_is_left_as_usual() -> None:
    with anyio.fail_after(DEADLINE):
        async with race_departure(stays):
            await anyio.sleep(0)
        with pytest.raises(ZeroDivisionError):
            async with race_departure(stays):
                raise ZeroDivisionError


@BACKENDS
async def test_interrupted_from_outside() -> None:
    race = race_departure(stays)
    race_is_on = anyio.Event()

    async def block() -> None:
        async with race:
            race_is_on.set()
            await anyio.sleep_forever()
        await anyio.sleep(0)
        ended.set()

    ended = anyio.Event()
    with anyio.fail_after(DEADLINE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block)
            await race_is_on.wait()
            race.interrupt()
            race.interrupt()
            await ended.wait()
            race.interrupt()  # too late to have an effect


@BACKENDS
@pytest.mark.parametrize("left", [stays, leaves])
async def test_whoever_cancels_the_request_gets_his_cancellation(left: Callable[[], Awaitable[None]]) -> None:
    with anyio.fail_after(DEADLINE):
        with anyio.CancelScope() as scope:
            async with race_departure(left):
                scope.cancel()
                await anyio.sleep_forever()
            pytest.fail("the cancellation was swallowed")
        assert scope.cancelled_caught


async def test_the_tasks_own_cancellation_and_the_clients_leaving_together() -> None:
    race = race_departure(stays)
    inside = anyio.Event()

    async def block() -> None:
        async with race_departure(stays) as _, race:
            inside.set()
            await anyio.sleep_forever()

    task = asyncio.create_task(block())
    with anyio.fail_after(DEADLINE):
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_deadline_inside_the_block_is_its_own() -> None:
    with anyio.fail_after(DEADLINE):
        async with race_departure(stays):
            with anyio.move_on_after(0) as inner:
                await anyio.sleep_forever()
            assert inner.cancelled_caught
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anyio.sleep_forever()


async def test_a_short_block_asks_nobody() -> None:
    asked = False

    async def ask() -> None:
        nonlocal asked
        asked = True

    with anyio.fail_after(DEADLINE):
        async with race_departure(ask):
            await anyio.sleep(0)
        assert not asked
        async with race_departure(ask):
            await anyio.sleep_forever()
        assert asked


async def test_a_server_whose_receive_fails_is_heard() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with anyio.fail_after(DEADLINE), pytest.raises(ZeroDivisionError):
        async with race_departure(fail):
            await anyio.sleep_forever()


async def test_no_watch_is_left_behind() -> None:
    before = asyncio.all_tasks()
    watching = anyio.Event()

    async def watch() -> None:
        watching.set()
        await anyio.sleep_forever()

    with anyio.fail_after(DEADLINE):
        async with race_departure(watch):
            await watching.wait()
    assert asyncio.all_tasks() == before
