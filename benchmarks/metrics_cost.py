"""What observing costs: CPU for each request, and how long a scrape of one vLLM holds up the event loop.

python benchmarks/metrics_cost.py
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.cli.logs import Terminal
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway.record import RequestRecord, access_log
from fluidmcp_proxy.gateway.request import Request
from fluidmcp_proxy.gateway.server_metrics import Told, merged, read
from fluidmcp_proxy.gateway.tally import BUCKETS, Tally

ROUNDS = 7
RECORD = RequestRecord(
    "7f3c" * 8, "POST", "/v1/chat/completions", "m", 200, 5120, 42, 1.5, 0.2, 0.0, "complete", "-", "-"
)


def cpu(what: Callable[[], object], times: int) -> float:
    """Microseconds of CPU a call: the best of some rounds, since others only add to it."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(times):
            what()
        found.append((time.process_time() - began) / times * 1e6)
    return min(found)


def library() -> Callable[[], object]:
    """The same counts by prometheus_client's own means."""
    registry, labels = CollectorRegistry(), ("model_id", "route")
    requests = Counter("requests", "-", (*labels, "status", "outcome"), registry=registry)
    kept = [Counter(name, "-", labels, registry=registry) for name in ("bytes", "chunks")]
    timed = [Histogram(name, "-", labels, registry=registry, buckets=BUCKETS) for name in ("all", "first", "queue")]

    def count() -> None:
        requests.labels(RECORD.model, RECORD.route, "200", RECORD.outcome).inc()
        for counter in kept:
            counter.labels(RECORD.model, RECORD.route).inc(42)
        for histogram in timed:
            histogram.labels(RECORD.model, RECORD.route).observe(0.2)

    return count


def ended() -> Callable[[], object]:
    """All that the end of a request costs with nobody who reads the access line."""
    gateway = Gateway(parse_config({"llmModels": {"m": {"endpoints": {"base_url": "http://127.0.0.1:1/v1"}}}}))
    scope = {"type": "http", "method": "POST", "path": "/m/v1/chat/completions", "headers": []}

    async def nothing(*_: Any) -> Any:
        raise NotImplementedError

    request = Request(scope, nothing, nothing, gateway._table)
    return lambda: gateway._accounts.close(request, 200, "complete")


def line() -> Callable[[], object]:
    """The access line, up to the terminal."""
    terminal = Terminal()
    terminal.setStream(io.StringIO())
    access_log.setLevel(logging.INFO)
    return lambda: terminal.report(RECORD)


class _Known(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def vllm_text() -> str:
    """About as much as a vLLM tells: 20 histograms, 40 counters."""
    registry, labels = CollectorRegistry(), ("engine", "model_name")
    for number in range(20):
        name = f"vllm:histogram_{number}"
        Histogram(name, "What it is.", labels, registry=registry, buckets=range(25)).labels("0", "org/model").observe(3)
    for number in range(40):
        Counter(f"vllm:counter_{number}", "What it is.", labels, registry=registry).labels("0", "org/model").inc(number)
    return generate_latest(registry).decode()


def parsed_and_written(text: str) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Known(list(text_string_to_metric_families(text))))
    return generate_latest(registry)


def by_lines(text: str) -> bytes:
    labels = {"model_id": "m"}
    return merged([Told(labels, read(text, labels))])


def main() -> None:
    tally, text = Tally(), vllm_text()
    print(f"counting a request:                {cpu(lambda: tally.count(RECORD), 20_000):8.2f} µs")
    print(f"  by prometheus_client:            {cpu(library(), 5_000):8.2f} µs")
    logging.disable(logging.INFO)
    print(f"its record, counted:               {cpu(ended(), 20_000):8.2f} µs")
    logging.disable(logging.NOTSET)
    print(f"its access line:                   {cpu(line(), 5_000):8.2f} µs")
    lines = text.count("\n")
    print(f"a vLLM's {lines} lines:               {cpu(lambda: by_lines(text), 20) / 1000:8.2f} ms")
    print(f"  by prometheus_client:            {cpu(lambda: parsed_and_written(text), 3) / 1000:8.2f} ms")


if __name__ == "__main__":
    main()
