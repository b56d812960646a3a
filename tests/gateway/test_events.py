"""The feed of the status page: one snapshot a second for all who look, nothing while nobody does."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import anyio
import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway import events
from fluidmcp_proxy.gateway.events import Counts, Feed, Pace, Snapshot, pace, show, wants_events
from fluidmcp_proxy.gateway.tally import Tally
from fluidmcp_proxy.models.fleet import Fleet
from fluidmcp_proxy.models.scheduler import Scheduler
from tests.gateway.conftest import remote
from tests.gateway.test_keys import ALICE, CI, KEYS, OPS, bearer, configured
from tests.models.doubles import FakeServer
from tests.serving import DEADLINE, eventually, serving, stub

Message = MutableMapping[str, Any]
EVENTS = {"accept": "text/event-stream"}


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, Counts(5.0, 1, 0, 0.0), Pace(None, "tokens", None)),
        (None, Counts(None, 1, 0, 0.0), Pace(None, "chunks", None)),
        (Counts(5.0, 1, 1, 0.5), Counts(25.0, 2, 3, 1.5), Pace(10.0, "tokens", 0.5)),
        (Counts(None, 1, 1, 0.5), Counts(25.0, 2, 1, 0.5), Pace(None, "tokens", None)),
        (Counts(25.0, 10, 0, 0.0), Counts(5.0, 10, 0, 0.0), Pace(0.0, "tokens", None)),  # started anew
        (Counts(25.0, 10, 0, 0.0), Counts(None, 14, 0, 0.0), Pace(2.0, "chunks", None)),
    ],
)
def test_what_follows_from_two_counts(before: Counts | None, now: Counts, told: Pace) -> None:
    assert pace(before, now, 2.0) == told


@pytest.mark.parametrize(
    ("method", "accept", "wanted"),
    [
        ("GET", b"text/event-stream", True),
        ("GET", b"text/html, text/event-stream;q=0.9", True),
        ("HEAD", b"text/event-stream", False),
        ("GET", b"*/*", False),
        ("GET", b"application/json", False),
    ],
)
def test_who_wants_events(method: str, accept: bytes, wanted: bool) -> None:
    assert wants_events(method, [(b"host", b"x"), (b"accept", accept)]) is wanted


# Snapshots


class CountingTokens:
    """Stands in for the servers: how often they were asked, and what they say."""

    def __init__(self) -> None:
        self.asked: list[set[str]] = []
        self.told: dict[str, float | None] = {"m": 1.0}
        self.holds: anyio.Event | None = None

    async def __call__(self, servers: dict[str, Any], patience: float) -> dict[str, float | None]:
        self.asked.append(set(servers))
        if self.holds is not None:
            await self.holds.wait()
        return self.told


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> CountingTokens:
    counting = CountingTokens()
    monkeypatch.setattr(events, "generated_tokens", counting)
    monkeypatch.setattr(events, "_EVERY", 0.02)
    return counting


def a_feed() -> tuple[Feed, Fleet]:
    config = parse_config({"llmModels": {"m": {"endpoints": {"base_url": "http://127.0.0.1:1/v1"}}}}, environ={})
    server = FakeServer(config.models["m"])
    scheduler = Scheduler()
    scheduler.admit(server)
    fleet = Fleet(scheduler, None, anyio.create_task_group())
    fleet.servers = {"m": server}
    return Feed(fleet, Tally()), fleet


async def follow(feed: Feed, count: int) -> list[Snapshot]:
    seen: list[Snapshot] = []
    while len(seen) < count:
        seen.append(await feed.after(seen[-1] if seen else None))
    return seen


@pytest.mark.anyio
async def test_viewers_share_a_snapshot(tokens: CountingTokens) -> None:
    feed, _ = a_feed()
    seen: list[list[Snapshot]] = []

    async def look() -> None:
        seen.append(await follow(feed, 5))

    with anyio.fail_after(DEADLINE):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(look)
    taken = {id(snapshot) for each in seen for snapshot in each}
    assert len(seen) == 20
    assert all(earlier.at < later.at for each in seen for earlier, later in pairwise(each))
    assert len(taken) == len(tokens.asked)  # each was taken once, and
    assert len(taken) < 20  # not each by everybody


@pytest.mark.anyio
async def test_nothing_is_done_while_nobody_looks(tokens: CountingTokens) -> None:
    feed, _ = a_feed()
    (old,) = await follow(feed, 1)
    asked = len(tokens.asked)
    await anyio.sleep(5 * events._EVERY)
    assert len(tokens.asked) == asked
    (new,) = await follow(feed, 1)
    assert new is not old  # who comes later is not shown what was then


@pytest.mark.anyio
async def test_who_takes_the_snapshot_may_leave(tokens: CountingTokens) -> None:
    feed, _ = a_feed()
    tokens.holds = anyio.Event()
    got: list[Snapshot] = []

    async def look() -> None:
        got.extend(await follow(feed, 1))

    with anyio.fail_after(DEADLINE):
        async with anyio.create_task_group() as tasks:
            leader = anyio.CancelScope()

            async def lead() -> None:
                with leader:
                    await look()

            tasks.start_soon(lead)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                tasks.start_soon(look)
            await anyio.wait_all_tasks_blocked()
            assert len(tokens.asked) == 1
            leader.cancel()
            await anyio.wait_all_tasks_blocked()
            assert len(tokens.asked) == 2  # another one takes over
            tokens.holds.set()
    assert len(got) == 3
    assert len({id(snapshot) for snapshot in got}) == 1


@pytest.mark.anyio
async def test_a_server_that_does_not_tell_is_left_alone(tokens: CountingTokens) -> None:
    feed, _ = a_feed()
    tokens.told = {"m": None}
    await follow(feed, 3)
    assert tokens.asked == [{"m"}, set(), set()]


# One feed over ASGI


async def shown(feed: Feed, receive: Any) -> list[Message]:
    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    with anyio.fail_after(DEADLINE):
        await show(feed, lambda snapshot: snapshot.event({"m"}, admin=False), receive, send, b"id")
    return said


async def stays() -> Message:
    await anyio.sleep_forever()
    raise AssertionError


@pytest.mark.anyio
async def test_a_feed_ends_and_is_asked_for_again(tokens: CountingTokens) -> None:
    said = await shown(a_feed()[0], stays)
    assert [message["more_body"] for message in said[1:]] == [True] * events._EVENTS + [False]
    assert dict(said[0]["headers"])[b"content-type"].startswith(b"text/event-stream")


@pytest.mark.anyio
async def test_it_ends_with_the_drain(tokens: CountingTokens) -> None:
    feed, fleet = a_feed()
    fleet.closing = True
    said = await shown(feed, stays)
    assert json.loads(said[1]["body"][6:])["closing"] is True
    assert [message["more_body"] for message in said[1:]] == [True, False]


@pytest.mark.anyio
async def test_a_viewer_that_leaves_is_forgotten(tokens: CountingTokens) -> None:
    received: Iterator[Message] = iter([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])

    async def leaves() -> Message:
        return next(received)

    feed, _ = a_feed()
    tokens.holds = anyio.Event()  # it waits for ever
    assert await shown(feed, leaves) == []
    assert feed._taken is None


# Through a gateway


@contextmanager
def feed_of(port: int, headers: dict[str, str], path: str = "/models") -> Iterator[Iterator[Any]]:
    """The events of a feed, as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    connection.request("GET", path, headers={**EVENTS, **headers})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    try:
        yield (json.loads(line[6:]) for line in iter(answer.readline, b"") if line.startswith(b"data: "))
    finally:
        answer.close()
        connection.close()


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy: a server tells late how many tokens there are, and a second is a long one."""
    monkeypatch.setattr(events, "_PATIENCE", DEADLINE)
    monkeypatch.setattr(events, "_STALE", DEADLINE)


@pytest.mark.usefixtures("unhurried")
def test_what_is_shown(server: str) -> None:
    """A server of its own: nobody else's tokens are counted."""
    with stub() as upstream, serving(remote(upstream), server) as gateway, feed_of(gateway, {}) as told:
        first = next(told)
        (model,) = first["models"]
        assert (first["admin"], first["closing"], model["id"]) == (False, False, "m")
        eventually(lambda: (one := next(told)["models"][0])["unit"] == "tokens" and one["per_second"] is not None)
        before = next(told)["time"]
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 5000})
        connection = http.client.HTTPConnection("127.0.0.1", gateway, timeout=DEADLINE)
        connection.request("POST", "/m/v1/chat/completions", body=body)
        assert connection.getresponse().status == 200
        connection.close()
        tokens, ttfbs = 0.0, []

        def is_seen() -> bool:
            nonlocal before, tokens
            event = next(told)
            (now,) = event["models"]
            assert now["unit"] == "tokens"
            tokens += now["per_second"] * (event["time"] - before)
            before = event["time"]
            ttfbs.append(now["ttfb"])
            return tokens > 2500 and any(ttfbs)

        eventually(is_seen, "the pace")
        assert tokens == pytest.approx(5000, rel=0.5), "not the few chunks in which they came"


def test_whose_models_are_shown(upstream: int) -> None:
    with serving(Gateway(configured(upstream, KEYS))) as port:
        for key, models, is_admin in ((ALICE, ["a", "b"], False), (CI, ["a"], False), (OPS, ["a", "b"], True)):
            with feed_of(port, bearer(key)) as told:
                event = next(told)
            assert ([model["id"] for model in event["models"]], event["admin"]) == (models, is_admin)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        connection.request("GET", "/models", headers=EVENTS)
        assert connection.getresponse().status == 401
        connection.close()


def asked(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_a_feed_does_not_hold_the_end_up(upstream: int) -> None:
    gateway = remote(upstream)

    async def app(scope: Message, receive: Any, send: Any) -> None:
        if scope.get("path") == "/close":  # as fluidmcp run does when it is told to end
            gateway.begin_shutdown()
        await gateway(scope, receive, send)

    with serving(app) as port, feed_of(port, {}) as told:
        assert next(told)["closing"] is False
        asked(port, "/close")
        assert [event["closing"] for event in told][-1] is True


def test_head_and_json_are_as_ever(upstream: int) -> None:
    with TestClient(remote(upstream)) as client:
        assert client.head("/models", headers=EVENTS).headers["content-type"] == "application/json"
        assert client.get("/models").json()["models"][0]["id"] == "m"


def test_its_requests_are_counted_apart(upstream: int) -> None:
    with serving(remote(upstream)) as port:
        with feed_of(port, {}) as told:
            next(told)

        def counted() -> bool:
            line = 'model_id="-",outcome="complete",route="/models events",status="200"'
            return line in asked(port, "/metrics")

        eventually(counted, "counted")
