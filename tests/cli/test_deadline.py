"""A deadline that is moved more often than its timer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluidmcp_proxy.cli.deadline import Deadline


class Loop:
    """An event loop's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.set = 0

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self.set += 1
        timer = Timer(self, self.now + seconds, callback)
        self.timers.append(timer)
        return timer

    def until(self, now: float) -> None:
        while due := [timer for timer in self.timers if timer.when <= now]:
            timer = min(due, key=lambda timer: timer.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.callback()
        self.now = now


class Timer:
    def __init__(self, loop: Loop, when: float, callback: Callable[[], None]) -> None:
        self.loop, self.when, self.callback = loop, when, callback

    def cancel(self) -> None:
        self.loop.timers.remove(self)


def make() -> tuple[Deadline, Loop, list[float]]:
    loop, reached = Loop(), list[float]()
    like_asyncio: Any = loop
    return Deadline(like_asyncio, lambda: reached.append(loop.now)), loop, reached


def test_it_is_reached_once() -> None:
    deadline, loop, reached = make()
    deadline.set(5)
    loop.until(100)
    assert reached == [5]
    assert not loop.timers


def test_moving_it_away_costs_no_timer() -> None:
    deadline, loop, reached = make()
    for second in range(1, 75):
        deadline.lift()
        deadline.set(75)
        loop.until(second)
    assert loop.set == 1
    loop.until(1000)
    assert reached == [73 + 75]
    assert loop.set == 2


def test_moving_it_nearer_does() -> None:
    deadline, loop, reached = make()
    deadline.set(75)
    loop.until(1)
    deadline.set(2)
    loop.until(1000)
    assert reached == [3]


def test_what_is_lifted_is_not_reached_and_may_be_set_again() -> None:
    deadline, loop, reached = make()
    deadline.set(5)
    deadline.lift()
    loop.until(50)
    assert reached == []
    assert not loop.timers
    deadline.set(5)
    loop.until(100)
    assert reached == [55]


def test_it_may_be_set_by_what_it_calls() -> None:
    loop, reached = Loop(), list[float]()
    like_asyncio: Any = loop

    def again() -> None:
        reached.append(loop.now)
        if len(reached) < 3:
            deadline.set(5)

    deadline = Deadline(like_asyncio, again)
    deadline.set(5)
    loop.until(100)
    assert reached == [5, 10, 15]


def test_nothing_is_left_of_a_cancelled_one() -> None:
    deadline, loop, reached = make()
    deadline.set(5)
    deadline.cancel()
    assert not loop.timers
    loop.until(100)
    assert reached == []
