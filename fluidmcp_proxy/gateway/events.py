"""The feed of the status page: what every model does, once a second, as server-sent events.

While nobody looks, nothing is done: there is no task. Whoever waits for the next second takes its snapshot for all who
wait for it, too; if that one leaves meanwhile, another takes it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from functools import partial
from time import time
from typing import Any, NamedTuple

import anyio

from fluidmcp_proxy.gateway.departure import race_departure
from fluidmcp_proxy.gateway.pages import described
from fluidmcp_proxy.gateway.server_metrics import generated_tokens
from fluidmcp_proxy.gateway.tally import Tally
from fluidmcp_proxy.models.fleet import Fleet
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.upstream.client import Headers

__all__ = ["LABEL", "Counts", "Feed", "Pace", "Snapshot", "pace", "show", "wants_events"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LABEL = "/models events"
"""What metrics call its requests, which last for a minute and would distort those of ``/models``."""

_EVERY = 1.0
_STALE = 3.0
"""Seconds after which a snapshot says nothing about the pace of now any more."""
_PATIENCE = 0.5
"""Seconds that the models' servers get to tell how many tokens they have generated."""
_NOT_ASKED = 10.0
"""Seconds for which a server is not asked again that has not told."""
_EVENTS = 60
"""Events until a feed ends, and the page asks for another one. An ASGI server that is told to end waits for its open
answers before it ends the lifespan, so none may be endless; and a key that has been taken away opens nothing for long.
"""


class Counts(NamedTuple):
    """What a model has done since it is counted; ``tokens`` None where its server does not tell."""

    tokens: float | None
    chunks: int
    answered: int
    waited: float


class Pace(NamedTuple):
    """What a model did a second, in ``unit``s, and the mean time to first byte of the requests that ended."""

    per_second: float | None
    unit: str
    ttfb: float | None


def pace(before: Counts | None, now: Counts, seconds: float) -> Pace:
    """What follows from two counts. A server that was started anew begins at zero."""
    if before is None:
        return Pace(None, "chunks" if now.tokens is None else "tokens", None)
    answered = now.answered - before.answered
    ttfb = (now.waited - before.waited) / answered if answered > 0 else None
    if now.tokens is not None:
        more = None if before.tokens is None else max(0.0, now.tokens - before.tokens) / seconds
        return Pace(more, "tokens", ttfb)
    return Pace(max(0, now.chunks - before.chunks) / seconds, "chunks", ttfb)


class Snapshot(NamedTuple):
    """All models at one moment: ``models`` has the JSON of each, ``at`` is the event loop's time."""

    at: float
    time: float
    models: Mapping[str, str]
    counts: Mapping[str, Counts]
    closing: bool

    def event(self, names: Collection[str], *, admin: bool) -> bytes:
        """The event for somebody for whom there are the models ``names``."""
        told = ",".join(model for name, model in self.models.items() if name in names)
        head = json.dumps({"time": round(self.time, 3), "closing": self.closing, "admin": admin})
        return f'data: {head[:-1]}, "models": [{told}]}}\n\n'.encode()


class Feed:
    """The snapshots of one run of a gateway."""

    def __init__(self, fleet: Fleet, tally: Tally) -> None:
        self._fleet = fleet
        self._tally = tally
        self._latest: Snapshot | None = None
        self._taken: anyio.Event | None = None
        self._unasked: dict[str, float] = {}

    async def after(self, last: Snapshot | None) -> Snapshot:
        """The next one after ``last``; for who has none, one that is at most a second old."""
        asked = anyio.current_time()
        while (latest := self._latest) is None or latest is last or latest.at < asked - _EVERY:
            if self._taken is not None:
                await self._taken.wait()
            else:
                await self._take()
        return latest

    async def _take(self) -> None:
        self._taken = taken = anyio.Event()
        try:
            if self._latest is not None:
                await anyio.sleep_until(self._latest.at + _EVERY)
            self._latest = self._snapshot(await self._tokens())
        finally:
            self._taken = None
            taken.set()

    async def _tokens(self) -> Mapping[str, float | None]:
        now = anyio.current_time()
        servers = {name: one for name, one in self._fleet.servers.items() if self._unasked.get(name, now) <= now}
        told = await generated_tokens(servers, _PATIENCE)
        self._unasked |= {name: now + _NOT_ASKED for name, total in told.items() if total is None}
        return told

    def _snapshot(self, tokens: Mapping[str, float | None]) -> Snapshot:
        scheduler, now, last = self._fleet.scheduler, anyio.current_time(), self._latest
        if last is not None and now - last.at > _STALE:
            last = None
        models, counts = {}, {}
        for name, status in scheduler.statuses().items():
            before = None if last is None else last.counts.get(name)
            counts[name] = self._count(scheduler, name, tokens.get(name), before)
            model_pace = pace(before, counts[name], _EVERY if last is None else now - last.at)
            model = {**described(scheduler, status), **model_pace._asdict()}
            models[name] = json.dumps(model, ensure_ascii=False, separators=(",", ":"))
        return Snapshot(now, time(), models, counts, self._fleet.closing)

    def _count(self, scheduler: Scheduler, model: str, tokens: float | None, before: Counts | None) -> Counts:
        """A request between its last byte and its record is in neither count, so chunks never go back."""
        chunks = self._tally.chunks_of(model) + scheduler.chunks(model)
        return Counts(tokens, max(chunks, 0 if before is None else before.chunks), *self._tally.first_bytes_of(model))


def wants_events(method: str, headers: Headers) -> bool:
    """Whether a request for the states asks for the feed of them."""
    return method == "GET" and any(name == b"accept" and b"text/event-stream" in value for name, value in headers)


async def show(feed: Feed, event: Callable[[Snapshot], bytes], receive: Receive, send: Send, request_id: bytes) -> None:
    """Send an ``event`` of each snapshot until the client leaves, the models are drained, or a minute is over."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would hold the events back
        (b"x-request-id", request_id),
    ]
    async with race_departure(partial(_left, receive)):
        try:
            snapshot = await feed.after(None)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for _ in range(_EVENTS):
                await send({"type": "http.response.body", "body": event(snapshot), "more_body": True})
                if snapshot.closing:
                    break
                snapshot = await feed.after(snapshot)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # it has left


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
