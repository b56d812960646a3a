"""Whose turn it is, on servers that do only what the test says, with a clock that the test moves; no event loop."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import hypothesis.stateful as stateful
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from fluidmcp_proxy.errors import ModelFailed, ModelStopped, QueueFull
from fluidmcp_proxy.models.lease import Lease
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import Phase
from fluidmcp_proxy.models.turns import TURN_REQUESTS, TURN_SECONDS, deadlines
from tests.models.doubles import FakeServer, model


def at_once(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what awaits nothing."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


class House:
    """A scheduler, its clock, and servers that are at rest."""

    def __init__(self, **models: dict[str, Any]) -> None:
        self.now = 1000.0
        self.scheduler = Scheduler(clock=lambda: self.now)
        self.servers: dict[str, FakeServer] = {}
        for name, keys in models.items():
            config = model(**keys).model_copy(update={"id": name})
            server = self.servers[name] = FakeServer(config)
            server.phase = Phase.RESTING
            self.scheduler.admit(server)

    def ask(self, name: str) -> Lease:
        lease = self.scheduler.lease(name)
        self.scheduler.arrive(lease, lease._desk)
        return lease

    def finish(self, lease: Lease) -> None:
        at_once(lease.__aexit__(None, None, None))

    def leave(self, lease: Lease) -> None:
        self.scheduler.give_up(lease, lease._desk)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.look_again()

    def asked(self, name: str) -> list[str]:
        asked, self.servers[name].asked = self.servers[name].asked, []
        return asked


def inside(*leases: Lease) -> list[bool]:
    return [lease.transport is not None for lease in leases]


# Limits


def test_max_concurrency_is_first_come_first_served() -> None:
    house = House(m={"max_concurrency": 2})
    house.servers["m"].become_ready()
    a, b, c, d, e = (house.ask("m") for _ in range(5))
    assert inside(a, b, c, d, e) == [True, True, False, False, False]
    house.leave(c)
    house.finish(b)
    assert inside(d, e) == [True, False]
    house.finish(a)
    assert inside(e) == [True]
    assert (house.scheduler.in_flight("m"), house.scheduler.waiting("m")) == (2, 0)


def test_nobody_overtakes_the_queue() -> None:
    house = House(m={"max_concurrency": 1})
    server = house.servers["m"]
    server.become_ready()
    first, second = house.ask("m"), house.ask("m")
    server.become(Phase.COMING)
    house.finish(first)
    third = house.ask("m")
    server.become_ready()
    assert inside(second, third) == [True, False]


def test_a_full_queue_says_when_to_come_back() -> None:
    house = House(m={"max_concurrency": 1, "max_queue": 3})
    house.servers["m"].become_ready()
    running, *waiting = (house.ask("m") for _ in range(4))
    with pytest.raises(QueueFull) as caught:
        house.ask("m")
    assert caught.value.retry_after == 5  # nothing is known of its speed yet
    for lease in (running, *waiting):
        house.pass_time(3)
        house.finish(lease)
        house.ask("m")
    with pytest.raises(QueueFull) as caught:
        house.ask("m")
    assert caught.value.retry_after == 12  # four ends, one every three seconds
    assert house.scheduler.waiting("m") == 3


def test_max_queue_0_lets_in_but_nobody_wait() -> None:
    house = House(m={"max_concurrency": 1, "max_queue": 0})
    house.servers["m"].become_ready()
    assert inside(house.ask("m")) == [True]
    with pytest.raises(QueueFull):
        house.ask("m")


# On demand


def test_the_first_request_starts_and_all_share_the_load() -> None:
    house = House(m={"start": "on_demand"})
    a, b = house.ask("m"), house.ask("m")
    assert house.asked("m") == ["start"]
    house.servers["m"].become_ready()
    assert inside(a, b) == [True, True]


def test_a_load_that_nobody_waits_for_any_more_is_given_up() -> None:
    house = House(m={"start": "on_demand"})
    a, b = house.ask("m"), house.ask("m")
    house.leave(a)
    assert house.asked("m") == ["start"]
    house.leave(b)
    assert house.asked("m") == ["stop"]
    c = house.ask("m")  # while it is still being stopped
    assert house.asked("m") == ["start"]
    house.servers["m"].become_ready()
    assert inside(c) == [True]


def test_a_load_goes_on_for_a_client_that_was_told_to_come_back() -> None:
    house = House(m={"start": "on_demand"})
    lease = house.ask("m")
    assert house.scheduler.out_of_patience(lease._desk, 0).code == "model_starting"
    house.leave(lease)
    house.pass_time(14)
    assert house.asked("m") == ["start"]
    house.pass_time(2)
    assert house.asked("m") == ["stop"]


def test_a_load_that_was_asked_for_by_hand_or_is_eager_goes_on() -> None:
    house = House(m={"start": "on_demand"}, eager={})
    for name in ("m", "eager"):
        house.scheduler.start(name)
        house.leave(house.ask(name))
        assert house.asked(name) == ["start"]


@pytest.mark.parametrize("start", ["on_demand", "eager"])
def test_an_idle_model_is_put_away_and_comes_back(start: str) -> None:
    house = House(m={"start": start, "idle_timeout": 60})
    server = house.servers["m"]
    house.scheduler.start("m")
    server.become_ready()
    house.pass_time(59)
    lease = house.ask("m")
    house.pass_time(1000)  # a request inside is not idleness, however long it takes
    assert house.asked("m") == ["start"]
    house.finish(lease)
    house.pass_time(59)
    assert house.asked("m") == []
    house.pass_time(1)
    assert house.asked("m") == ["rest"]
    assert house.scheduler.missing() == []
    lease = house.ask("m")
    assert house.asked("m") == ["start"]
    server.become_ready()
    assert inside(lease) == [True]


@pytest.mark.parametrize("began", [1000.1, 14885.306, 0.7])
def test_a_deadline_is_due_when_it_is_reached_however_it_rounds(began: float) -> None:
    for timeout in (0.1, 0.3, 0.7, 1.1):
        house = House(m={"idle_timeout": timeout})
        house.now = began
        house.servers["m"].become_ready()
        (due,) = deadlines(house.scheduler._desks["m"].slot, house.now)
        house.pass_time(0)
        assert house.asked("m") == []
        house.now = due
        house.scheduler.look_again()
        assert house.asked("m") == ["rest"]


def test_a_failure_lasts_a_minute() -> None:
    house = House(m={"start": "on_demand"}, eager={})
    for name in ("m", "eager"):
        house.scheduler.start(name)
        lease = house.ask(name)
        house.servers[name].fail()
        assert isinstance(lease.refusal, ModelFailed)
        house.pass_time(59)
        with pytest.raises(ModelFailed):
            house.ask(name)
        assert house.asked(name) == ["start"]
        house.pass_time(1)
    house.ask("m")
    assert house.asked("m") == ["start"]
    with pytest.raises(ModelFailed):
        house.ask("eager")
    house.scheduler.start("eager")
    assert house.asked("eager") == ["start"]


def test_stopped_by_hand_it_stays_so() -> None:
    house = House(m={"start": "on_demand"})
    waiting = house.ask("m")
    house.scheduler.stop("m")
    assert house.asked("m") == ["start", "stop"]
    assert isinstance(waiting.refusal, ModelStopped)
    with pytest.raises(ModelStopped):
        house.ask("m")
    house.servers["m"].become(Phase.RESTING)
    house.scheduler.start("m")
    house.servers["m"].become_ready()
    assert inside(house.ask("m")) == [True]


def test_what_is_missing() -> None:
    house = House(eager={}, later={"start": "on_demand"})
    assert house.scheduler.missing() == ["eager"]
    house.scheduler.start("eager")
    house.servers["eager"].become_ready()
    assert house.scheduler.missing() == []
    house.servers["eager"].become(Phase.COMING)  # a crash
    assert house.scheduler.missing() == ["eager"]
    house.scheduler.stop("eager")
    assert house.scheduler.missing() == []


# Groups


def pair(**keys: Any) -> House:
    return House(a={"group": "g", **keys}, b={"group": "g", **keys})


def awake(house: House, name: str) -> None:
    house.servers[name].become_ready()


def test_the_next_one_starts_when_the_last_is_at_rest() -> None:
    house = pair()
    first = house.ask("a")
    awake(house, "a")
    second = house.ask("b")
    assert (house.asked("a"), house.asked("b")) == (["start"], [])  # a is busy
    house.finish(first)
    assert (house.asked("a"), house.asked("b")) == (["rest"], [])
    house.servers["a"].become(Phase.RESTING)
    assert house.asked("b") == ["start"]
    awake(house, "b")
    assert inside(second) == [True]


def test_a_model_keeps_its_turn_for_so_many_requests() -> None:
    house = pair()
    first = house.ask("a")
    awake(house, "a")
    for _ in range(TURN_REQUESTS):  # as long as nobody else waits they do not count
        house.finish(house.ask("a"))
    waits = house.ask("b")
    for _ in range(TURN_REQUESTS):
        lease = house.ask("a")
        assert inside(lease) == [True]
        house.finish(lease)
    late = house.ask("a")
    assert inside(late) == [False]
    house.finish(first)
    house.servers["a"].become(Phase.RESTING)
    awake(house, "b")
    assert inside(waits, late) == [True, False]
    house.finish(waits)
    house.servers["b"].become(Phase.RESTING)
    awake(house, "a")
    assert inside(late) == [True]


def test_a_model_keeps_its_turn_for_so_long() -> None:
    house = pair()
    first = house.ask("a")
    awake(house, "a")
    house.ask("b")
    house.pass_time(TURN_SECONDS - 0.1)
    assert inside(house.ask("a")) == [True]
    house.pass_time(0.2)
    assert inside(house.ask("a")) == [False]
    house.finish(first)
    assert house.asked("a") == ["start"], "never with a request inside"


def test_when_the_others_have_left_the_turn_goes_on() -> None:
    house = pair()
    held = house.ask("a")
    awake(house, "a")
    other = house.ask("b")
    house.pass_time(TURN_SECONDS)
    waiting = house.ask("a")
    assert inside(held, waiting) == [True, False]
    house.leave(other)
    assert inside(waiting) == [True]


def test_a_model_whose_turn_is_over_goes_behind_all_others() -> None:
    house = House(a={"group": "g", "max_concurrency": 1}, b={"group": "g"}, c={"group": "g"})
    running, *_ = (house.ask("a") for _ in range(3))
    awake(house, "a")
    house.ask("b")
    house.pass_time(TURN_SECONDS)
    house.finish(running)
    house.ask("c")  # later than the requests of a that still wait
    house.servers["a"].become(Phase.RESTING)
    assert house.asked("b") == ["start"]
    awake(house, "b")
    house.finish(next(iter(house.scheduler._desks["b"].inside)))
    house.servers["b"].become(Phase.RESTING)
    assert house.asked("c") == ["start"]


def test_a_load_that_is_waited_for_is_brought_to_its_end_and_another_gives_way() -> None:
    house = pair()
    first = house.ask("a")
    house.ask("b")
    assert (house.asked("a"), house.asked("b")) == (["start"], [])
    house.leave(first)
    assert (house.asked("a"), house.asked("b")) == (["stop"], [])
    house.servers["a"].become(Phase.RESTING)
    assert house.asked("b") == ["start"]


def test_a_crash_does_not_hand_the_turn_on_while_it_has_requests() -> None:
    house = pair()
    first = house.ask("a")
    awake(house, "a")
    house.ask("b")
    house.servers["a"].become(Phase.COMING)
    house.finish(first)
    assert house.asked("a") == ["start", "stop"]  # nobody waits for it


def test_a_failed_model_hands_the_turn_on() -> None:
    house = pair()
    first = house.ask("a")
    second = house.ask("b")
    house.servers["a"].fail()
    assert isinstance(first.refusal, ModelFailed)
    awake(house, "b")
    assert inside(second) == [True]


def test_a_start_by_hand_waits_for_its_turn_like_a_request() -> None:
    house = pair()
    first = house.ask("a")
    awake(house, "a")
    house.scheduler.start("b")
    house.finish(first)
    house.servers["a"].become(Phase.RESTING)
    assert house.asked("b") == ["start"]
    house.ask("a")
    assert house.asked("a") == ["start", "rest"]  # b is loading for somebody
    awake(house, "b")
    assert house.asked("b") == ["rest"]


# Against a simple model


GROUPS = {"a": "g", "b": "g", "c": "g", "d": "h", "e": "h"}
LIMITS = {"a": 1, "b": None, "c": 2, "d": 3, "e": None, "f": 2}
names = st.sampled_from(sorted(LIMITS))
picks = st.integers(0, 10_000)


class Guarded(FakeServer):
    """Is never put away with a request inside, unless by hand."""

    by_hand = False
    house: House

    def request_stop(self) -> None:
        assert self.by_hand or self.phase is not Phase.READY
        super().request_stop()

    def request_rest(self) -> None:
        assert not self.house.scheduler.in_flight(self.config.id), "a busy one was put away"
        super().request_rest()


class Turns(stateful.RuleBasedStateMachine):
    """The model: an ordered list of the leases of each name, and which of them are known to be inside."""

    def __init__(self) -> None:
        super().__init__()
        keys = {name: {"max_concurrency": LIMITS[name], "max_queue": 20, "start": "on_demand"} for name in LIMITS}
        for name, group in GROUPS.items():
            keys[name]["group"] = group
        keys["e"]["idle_timeout"] = keys["f"]["idle_timeout"] = 5
        self.house = House()
        for name in LIMITS:
            server = Guarded(model(**keys[name]).model_copy(update={"id": name}))
            server.phase = Phase.RESTING
            server.house = self.house
            self.house.servers[name] = server
            self.house.scheduler.admit(server)
        self.leases: dict[str, list[Lease]] = {name: [] for name in LIMITS}

    def _there(self) -> list[tuple[str, Lease]]:
        return [(name, lease) for name, leases in self.leases.items() for lease in leases]

    @stateful.rule(name=names)
    def arrive(self, name: str) -> None:
        lease = self.house.scheduler.lease(name)
        full = self.house.scheduler.waiting(name) >= 20
        try:
            self.house.scheduler.arrive(lease, lease._desk)
        except QueueFull:
            refused_well = full
        except (ModelStopped, ModelFailed):
            refused_well = lease._desk.barred or self.house.servers[name].failed
        else:
            refused_well = True
            self.leases[name].append(lease)
        assert refused_well

    @stateful.rule(pick=picks)
    def depart(self, pick: int) -> None:
        """A request ends, or a client leaves that waits, or that was let in just now and does not know it yet."""
        if there := self._there():
            name, lease = there[pick % len(there)]
            self.leases[name].remove(lease)
            if lease.transport is None or pick % 3 == 0:
                self.house.leave(lease)
            else:
                self.house.finish(lease)

    @stateful.rule(name=names)
    def go_on(self, name: str) -> None:
        server = self.house.servers[name]
        if server.phase is Phase.COMING:
            server.become_ready()
        elif server.phase is Phase.GOING:
            server.become(Phase.RESTING)

    @stateful.rule(name=names)
    def crash(self, name: str) -> None:
        server = self.house.servers[name]
        if server.phase is Phase.READY:
            server.become(Phase.COMING)
        elif server.phase is Phase.COMING:
            server.fail()

    @stateful.rule(seconds=st.sampled_from([0.1, 1, 6, 11, 61]))
    def pass_time(self, seconds: float) -> None:
        self.house.pass_time(seconds)

    @stateful.rule(name=names, what=st.sampled_from(["start", "stop", "restart"]))
    def by_hand(self, name: str, what: str) -> None:
        server = self.house.servers[name]
        assert isinstance(server, Guarded)
        server.by_hand = True
        getattr(self.house.scheduler, what)(name)
        server.by_hand = False

    @stateful.rule(name=names)
    def impatient(self, name: str) -> None:
        waiting = [lease for lease in self.leases[name] if lease.transport is None]
        if waiting:
            assert self.house.scheduler.out_of_patience(waiting[-1]._desk, 1).retry_after
            self.leases[name].remove(waiting[-1])
            self.house.leave(waiting[-1])

    @stateful.invariant()
    def the_refused_have_left(self) -> None:
        for name, leases in self.leases.items():
            self.leases[name] = [lease for lease in leases if lease.refusal is None]

    @stateful.invariant()
    def counts_agree_and_the_first_are_inside(self) -> None:
        for name, leases in self.leases.items():
            there = [lease.transport is not None for lease in leases if lease.refusal is None]
            assert sum(there) == self.house.scheduler.in_flight(name)
            assert len(there) - sum(there) == self.house.scheduler.waiting(name)
            assert there == sorted(there, reverse=True), "somebody was overtaken"
            assert sum(there) <= (LIMITS[name] or len(there))

    @stateful.invariant()
    def one_of_a_group_is_awake(self) -> None:
        for group in ("g", "h"):
            members = [self.house.servers[name] for name in GROUPS if GROUPS[name] == group]
            assert sum(server.phase is not Phase.RESTING for server in members) <= 1

    @stateful.invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Where somebody waits something is under way: a server, or a request inside, or the turn of others."""
        for name, server in self.house.servers.items():
            if not self.house.scheduler.waiting(name):
                continue
            group = GROUPS.get(name)
            members = [self.house.servers[other] for other in GROUPS if group and GROUPS[other] == group] or [server]
            (active,) = (member for member in members if member.phase is not Phase.RESTING)
            if active.phase is Phase.READY and not self.house.scheduler.in_flight(active.config.id):
                assert active is not server, "it could enter"
                desk = self.house.scheduler._desks[active.config.id]
                assert desk.promised_until > self.house.now, "it could be put away"

    @stateful.invariant()
    def nothing_loads_for_nobody(self) -> None:
        for name, server in self.house.servers.items():
            desk = self.house.scheduler._desks[name]
            if server.phase is Phase.COMING and not desk.queue and not desk.asked:
                promised = desk.promised_until > self.house.now
                assert promised or (desk.kept and not desk.slot.line), desk

    def teardown(self) -> None:
        """Whatever the state, all that wait get their turn once servers work and clients end."""
        for _ in range(200):
            self.the_refused_have_left()
            if not self._there():
                break
            for name in LIMITS:
                self.go_on(name)
            for name, lease in self._there():
                if lease.transport is not None:
                    self.leases[name].remove(lease)
                    self.house.finish(lease)
            self.pass_time(1)
        assert not self._there()
        assert all(self.house.scheduler.in_flight(name) == self.house.scheduler.waiting(name) == 0 for name in LIMITS)


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
