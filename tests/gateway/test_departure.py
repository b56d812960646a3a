"""The race around every request: on asyncio by the task's own cancellation, on trio by a task group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.gateway.departure import race_departure
from tests.models.virtual_time import BACKEND
from tests.serving import DEADLINE

BACKENDS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
IN_NO_TIME = pytest.mark.parametrize("anyio_backend", [BACKEND])
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


@IN_NO_TIME
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


visitor: ContextVar[str] = ContextVar("visitor")


async def test_each_is_watched_in_its_own_context() -> None:
    """One timer serves all blocks, and must not ask one's server in the name of another."""
    seen: list[str] = []

    async def block(name: str) -> None:
        visitor.set(name)

        async def ask() -> None:
            seen.append(visitor.get())

        async with race_departure(ask):
            await anyio.sleep_forever()

    with anyio.fail_after(DEADLINE):
        await asyncio.gather(*(block(name) for name in "abc"))
    assert sorted(seen) == ["a", "b", "c"]


@IN_NO_TIME
async def test_many_blocks_need_one_timer_and_none_when_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    set_: list[asyncio.TimerHandle] = []
    began = loop.time()
    original = loop.call_later

    def call_later(delay: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
        set_.append(original(delay, callback, *arguments))
        return set_[-1]

    monkeypatch.setattr(loop, "call_later", call_later)
    with anyio.fail_after(DEADLINE):
        for _ in range(100):
            async with race_departure(stays):
                await asyncio.sleep(0)
        assert len(set_) == 1
        async with race_departure(leaves):
            await anyio.sleep_forever()
        over = asyncio.Event()
        original(5 * (set_[0].when() - began), over.set)  # some ticks later, if there are any
        before = len(set_)
        await over.wait()
    assert len(set_) <= before + 1


def test_one_event_loop_after_the_other() -> None:
    async def block() -> None:
        with anyio.fail_after(DEADLINE):
            async with race_departure(leaves):
                await anyio.sleep_forever()

    for _ in range(2):
        asyncio.run(block())


def test_an_event_loop_that_rested_goes_on() -> None:
    """Another one has run in its thread meanwhile."""

    async def block() -> None:
        async with race_departure(leaves):
            await anyio.sleep_forever()

    async def all_of(*tasks: asyncio.Task[None]) -> None:
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*tasks, block())

    with asyncio.Runner() as one, asyncio.Runner() as other:
        task = one.get_loop().create_task(block())
        one.run(asyncio.sleep(0))
        other.run(all_of())
        one.run(all_of(task))
