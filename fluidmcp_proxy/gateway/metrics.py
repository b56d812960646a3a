"""``/metrics``: what the gateway has counted, what its models do, and what their servers tell of themselves.

To be imported when a gateway runs: prometheus_client looks around in ``/proc`` when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fluidmcp_proxy.gateway.server_metrics import Told, merged, scrape
from fluidmcp_proxy.gateway.tally import BUCKETS, Histogram, Tally
from fluidmcp_proxy.models.fleet import Fleet
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import ModelState, ModelStatus

__all__ = ["exposition"]

_BOUNDS = [*map(str, BUCKETS), "+Inf"]


async def exposition(tally: Tally, fleet: Fleet) -> bytes:
    """All of it in Prometheus' text format, within a second."""
    told = await scrape(fleet.servers)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(tally, fleet.scheduler, told))
    return generate_latest(registry) + merged(told)


class _Collector(Collector):
    """The gateway's own metrics at one moment."""

    def __init__(self, tally: Tally, scheduler: Scheduler, told: Sequence[Told]) -> None:
        self._tally = tally
        self._scheduler = scheduler
        self._told = told

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        yield from _of_requests(self._tally)
        statuses = self._scheduler.statuses()
        inside = {name: self._scheduler.in_flight(name) for name in statuses}
        yield _by_model("fluidmcp_requests_in_flight", "Requests inside the model's server.", inside)
        waiting = {name: self._scheduler.waiting(name) for name in statuses}
        yield _by_model("fluidmcp_requests_queued", "Requests that wait for the model.", waiting)
        yield from _of_models(statuses)
        up = GaugeMetricFamily("fluidmcp_model_metrics_up", "Whether the ready model's server has told its metrics.")
        for server in self._told:
            up.add_sample(up.name, dict(server.labels), float(server.families is not None))
        yield up


def _of_requests(tally: Tally) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "fluidmcp_requests", "Requests that are over.", labels=["model_id", "route", "status", "outcome"]
    )
    for (model, name, status, outcome), count in tally.requests.items():
        requests.add_metric([model, name, "-" if status is None else str(status), outcome], count)
    yield requests
    labels = ["model_id", "route"]
    duration = HistogramMetricFamily("fluidmcp_request_duration_seconds", "From a request to its end.", labels=labels)
    ttfb = HistogramMetricFamily(
        "fluidmcp_request_time_to_first_byte_seconds", "From a request to the first byte of its answer.", labels=labels
    )
    size = CounterMetricFamily("fluidmcp_response_bytes", "Bytes that the models' servers answered.", labels=labels)
    chunks = CounterMetricFamily("fluidmcp_response_chunks", "Pieces in which they came.", labels=labels)
    for key, route in tally.routes.items():
        _add(duration, [*key], route.duration)
        if not route.chunks:
            continue  # such as those that are refused
        _add(ttfb, [*key], route.ttfb)
        size.add_metric([*key], route.bytes)
        chunks.add_metric([*key], route.chunks)
    yield from (duration, ttfb, size, chunks)
    queue = HistogramMetricFamily(
        "fluidmcp_request_queue_seconds", "Waiting for the model to load, or for a turn.", labels=["model_id"]
    )
    for model, waited in tally.queues.items():
        _add(queue, [model], waited)
    yield queue


def _add(family: HistogramMetricFamily, labels: list[str], seen: Histogram) -> None:
    family.add_metric(labels, list(zip(_BOUNDS, accumulate(seen.counts), strict=True)), seen.sum)


def _of_models(statuses: Mapping[str, ModelStatus]) -> Iterator[Metric]:
    states = GaugeMetricFamily("fluidmcp_model_state", "1 for the model's state.", labels=["model_id", "state"])
    starts = CounterMetricFamily("fluidmcp_model_starts", "Starts of the model's server.", labels=["model_id"])
    for name, status in statuses.items():
        for state in ModelState:
            states.add_metric([name, state], float(status.state is state))
        starts.add_metric([name], status.spawns)
    yield states
    yield starts
    restarts = {name: status.restarts for name, status in statuses.items()}
    yield _by_model("fluidmcp_model_restarts", "Restarts in a row, after failures.", restarts)
    loads = {name: status.load_seconds for name, status in statuses.items() if status.load_seconds is not None}
    yield _by_model("fluidmcp_model_load_seconds", "From the last start, or waking up, to ready.", loads)


def _by_model(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["model_id"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family
