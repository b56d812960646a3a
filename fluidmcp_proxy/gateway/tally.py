"""What is counted of requests, as plain integers, when each is over. Telling it is another module's business.

prometheus_client's own counters lock and look their labels up for each increment. Every key here is of few values, none
of them a client's choice.
"""

from __future__ import annotations

from bisect import bisect_left

from fluidmcp_proxy.gateway.record import RequestRecord

__all__ = ["BUCKETS", "Histogram", "RouteTally", "Tally"]

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds in seconds: from an embedding to a generation of ten minutes."""


class Histogram:
    """How many observations lie below which of ``BUCKETS`` first; the last of ``counts`` are those above all."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class RouteTally:
    """The requests of one model on one route."""

    __slots__ = ("bytes", "chunks", "duration", "ttfb")

    def __init__(self) -> None:
        self.duration = Histogram()
        self.ttfb = Histogram()
        self.bytes = self.chunks = 0


class Tally:
    """Everything since it was made: ``requests`` by model, route, status and outcome, ``routes`` by model and route,
    ``queues`` by model.
    """

    __slots__ = ("queues", "requests", "routes")

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, int | None, str], int] = {}
        self.routes: dict[tuple[str, str], RouteTally] = {}
        self.queues: dict[str, Histogram] = {}

    def count(self, record: RequestRecord) -> None:
        """A request is over."""
        model, route = record.model, record.route
        key = (model, route, record.status, record.outcome)
        self.requests[key] = self.requests.get(key, 0) + 1
        tally = self.routes.get((model, route))
        if tally is None:
            tally = self.routes[model, route] = RouteTally()
        tally.duration.observe(record.seconds)
        if record.ttfb is not None:
            tally.ttfb.observe(record.ttfb)
            tally.bytes += record.bytes
            tally.chunks += record.chunks
        if record.queue is not None:
            queue = self.queues.get(model)
            if queue is None:
                queue = self.queues[model] = Histogram()
            queue.observe(record.queue)

    def chunks_of(self, model: str) -> int:
        """In how many pieces the answers of ``model`` came."""
        return sum(route.chunks for (name, _), route in self.routes.items() if name == model)

    def first_bytes_of(self, model: str) -> tuple[int, float]:
        """How many requests to ``model`` got a first byte, and for how many seconds they waited for it in all."""
        seen = [route.ttfb for (name, _), route in self.routes.items() if name == model]
        return sum(sum(ttfb.counts) for ttfb in seen), sum(ttfb.sum for ttfb in seen)
