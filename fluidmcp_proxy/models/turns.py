"""Whose turn it is: the decisions about who may enter a model, which model is started and which has to go.

Functions over plain state, without a loop, a clock or an action of their own; the ``Scheduler`` does what they say.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from fluidmcp_proxy.models.desk import Desk, Slot
from fluidmcp_proxy.models.state import Phase

__all__ = ["TURN_REQUESTS", "TURN_SECONDS", "Ask", "deadlines", "line_up", "may_enter", "next_ask"]

TURN_SECONDS = 10.0
"""The longest that a model keeps its group's slot while it has requests and another model is waited for …"""

TURN_REQUESTS = 64
"""… and how many requests enter it in that time at most."""


class Ask(Enum):
    """What a model's server is asked to do."""

    START = auto()
    STOP = auto()
    REST = auto()  # sleep if it can, else stop


def wants(desk: Desk, now: float) -> bool:
    """Whether somebody waits for the model, or was told to come back for it."""
    return bool(desk.queue) or desk.asked or now < desk.promised_until


def line_up(slot: Slot, now: float) -> None:
    """Bring holder and line up to date with the phases and wishes of the desks."""
    former = slot.holder
    if former is not None and former.phase is Phase.RESTING:
        slot.holder = None
    if slot.holder is None:
        # Awake without having been given the slot: run by somebody else, or asked directly. It has it, then.
        slot.holder = next((desk for desk in slot.desks if desk.phase is not Phase.RESTING), None)
    for desk in slot.desks:
        if desk is not slot.holder and desk is not former:
            _join_or_leave(slot, desk, now)
    if former is not None and former is not slot.holder:  # behind those that came while it had the slot
        _join_or_leave(slot, former, now)
    if slot.holder is None and slot.line:
        slot.holder = next(iter(slot.line))
    if slot.holder is not None:
        slot.line.pop(slot.holder, None)
    _count_turn(slot, now)


def _join_or_leave(slot: Slot, desk: Desk, now: float) -> None:
    if wants(desk, now):
        slot.line.setdefault(desk)
    else:
        slot.line.pop(desk, None)


def _count_turn(slot: Slot, now: float) -> None:
    holder = slot.holder
    if holder is None or holder.phase is not Phase.READY or not slot.line:
        slot.contested_since = None
    elif slot.contested_since is None:
        slot.contested_since, slot.served = now, 0


def turn_is_over(slot: Slot, now: float) -> bool:
    """Whether the holder has had its share since others began to wait."""
    return slot.contested_since is not None and (
        slot.served >= TURN_REQUESTS or now >= slot.contested_since + TURN_SECONDS
    )


def may_enter(desk: Desk, now: float) -> bool:
    """Whether the next request may go to the model's server. One that is ready has its slot."""
    return (
        desk.phase is Phase.READY
        and (desk.limit is None or len(desk.inside) < desk.limit)
        and not turn_is_over(desk.slot, now)
    )


def is_idle(desk: Desk, now: float) -> bool:
    """Whether the model has had nothing to do for its ``idle_timeout``."""
    return not desk.inside and desk.idle_timeout is not None and now >= desk.idle_since + desk.idle_timeout


def next_ask(slot: Slot, now: float) -> Ask | None:
    """What to ask of the slot's holder now, after ``line_up``.

    A model with requests inside is left alone. One that loads is given up when nobody waits for it and it is either
    wanted by nobody else or in the way of one that is waited for.
    """
    holder = slot.holder
    if holder is None:
        return None
    needed, contested = wants(holder, now), bool(slot.line)
    if holder.phase is Phase.RESTING:
        return Ask.START
    if holder.phase is Phase.GOING:
        return Ask.START if needed and not contested else None
    if holder.phase is Phase.COMING:
        return Ask.STOP if not needed and (contested or not holder.kept) else None
    if holder.inside:
        return None
    if contested and (not needed or turn_is_over(slot, now)):
        return Ask.REST
    return Ask.REST if not needed and is_idle(holder, now) else None


def deadlines(slot: Slot, now: float) -> Iterator[float]:
    """The times after ``now`` at which a decision may be another one although nothing has happened.

    Calculated as the decisions do: with a difference instead of a sum, rounding can leave one neither due nor ahead.
    """
    times = [desk.promised_until for desk in slot.desks]
    if slot.contested_since is not None:
        times.append(slot.contested_since + TURN_SECONDS)
    holder = slot.holder
    if holder is not None and holder.phase is Phase.READY and not holder.inside and holder.idle_timeout is not None:
        times.append(holder.idle_since + holder.idle_timeout)
    return (time for time in times if time > now)
