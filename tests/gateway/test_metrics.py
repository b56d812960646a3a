"""/metrics: a valid exposition, with what has really happened, and nothing that a client chooses."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from websockets.sync.client import connect

from fluidmcp_proxy.gateway.tally import BUCKETS, Histogram
from tests.gateway.conftest import remote
from tests.serving import DEADLINE, eventually, raw_exchange, serving

CHAT = "/m/v1/chat/completions"
SECRET = "canary-4711"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """By name and labels; the text must be valid, with one block for each family and no sample twice."""
    families = list(text_string_to_metric_families(text))
    names = [line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))
    found = [
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in families
        for sample in family.samples
    ]
    samples = dict(found)
    assert len(samples) == len(found)
    return samples


def scraped(port: int) -> Samples:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert SECRET not in answer.text
    return samples_of(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def ask(port: int, path: str = CHAT, **keys: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": f"{SECRET} a b"}], **keys}
    headers = {"authorization": f"Bearer {SECRET}"}
    httpx.post(f"http://127.0.0.1:{port}{path}?key={SECRET}", json=body, headers=headers, timeout=DEADLINE)


def cut(port: int) -> None:
    body = json.dumps({"messages": [], "stream": True, "max_tokens": 20, "stub": {"cut-after": 700}}).encode()
    raw_exchange(port, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def leave(port: int, *, stream: bool) -> None:
    """As soon as the request is inside, or has begun to be answered."""
    body = json.dumps({"messages": [], "stream": stream, "stub": {"hang-after": 1}}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            received = b""
            while b"data: " not in received:
                received += connection.recv(65536)
        else:
            eventually(lambda: value(scraped(port), "fluidmcp_requests_in_flight", model_id="m") == 1, "inside")


@pytest.fixture
def port(upstream: int) -> Iterator[int]:
    with serving(remote(upstream)) as port:
        yield port


@pytest.mark.parametrize(
    ("what", "labels"),
    [
        (lambda port: ask(port), ("m", "/v1/chat/completions", "200", "complete")),
        (lambda port: ask(port, "/v1/chat/completions"), ("m", "/v1/chat/completions", "200", "complete")),
        (lambda port: ask(port, "/m/v1/nothing/here"), ("m", "other", "404", "complete")),
        (lambda port: ask(port, stub={"status": 500}), ("m", "/v1/chat/completions", "500", "complete")),
        (lambda port: ask(port, f"/{SECRET}/v1/x"), ("-", "-", "404", "refused")),
        (lambda port: ask(port, "/m/v1/raw"), ("m", "other", "502", "upstream_died")),
        (cut, ("m", "/v1/chat/completions", "200", "upstream_died")),
        (lambda port: leave(port, stream=False), ("m", "/v1/chat/completions", "-", "client_left")),
        (lambda port: leave(port, stream=True), ("m", "/v1/chat/completions", "200", "client_left")),
        (
            lambda port: httpx.get(f"http://127.0.0.1:{port}/health", timeout=DEADLINE),
            ("-", "/health", "200", "complete"),
        ),
    ],
)
def test_each_request_is_counted_once(port: int, what: Any, labels: tuple[str, str, str, str]) -> None:
    what(port)
    wanted = dict(zip(("model_id", "route", "status", "outcome"), labels, strict=True))
    eventually(lambda: value(scraped(port), "fluidmcp_requests_total", **wanted) == 1, "it is counted")
    samples = scraped(port)
    others = {key: count for key, count in samples.items() if key[0] == "fluidmcp_requests_total"}
    assert sum(count for key, count in others.items() if ("route", "/metrics") not in key[1]) == 1
    seen = {name: wanted[name] for name in ("model_id", "route")}
    assert value(samples, "fluidmcp_request_duration_seconds_count", **seen) == 1


def test_what_is_measured(port: int) -> None:
    for _ in range(3):
        ask(port, stream=True, max_tokens=4, stub={"answer-delay": 0.1})
    where = {"model_id": "m", "route": "/v1/chat/completions"}
    duration, first_byte = "fluidmcp_request_duration_seconds", "fluidmcp_request_time_to_first_byte_seconds"
    eventually(lambda: value(scraped(port), f"{duration}_count", **where) == 3, "they are over")
    eventually(lambda: value(scraped(port), "fluidmcp_model_state", model_id="m", state="ready") == 1, "ready")
    samples = scraped(port)
    assert value(samples, f"{first_byte}_count", **where) == 3
    assert value(samples, "fluidmcp_request_queue_seconds_count", model_id="m") == 3
    queue = value(samples, "fluidmcp_request_queue_seconds_sum", model_id="m")
    until, whole = (value(samples, f"{name}_sum", **where) for name in (first_byte, duration))
    assert queue is not None
    assert until is not None
    assert whole is not None
    assert queue + 0.3 <= until <= whole  # nobody has waited for its turn
    size, chunks = (value(samples, f"fluidmcp_response_{kind}_total", **where) for kind in ("bytes", "chunks"))
    assert size is not None
    assert chunks is not None
    assert size > 600
    assert 3 <= chunks < size
    assert value(samples, "fluidmcp_model_state", model_id="m", state="ready") == 1
    assert value(samples, "fluidmcp_model_state", model_id="m", state="failed") == 0


def test_in_flight_and_queued(upstream: int) -> None:
    body = json.dumps({"messages": [], "stub": {"hang": True}}).encode()
    request = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def now(port: int) -> tuple[float | None, ...]:
        samples = scraped(port)
        return tuple(value(samples, f"fluidmcp_requests_{what}", model_id="m") for what in ("in_flight", "queued"))

    with serving(remote(upstream, max_concurrency=1)) as port:
        with contextlib.ExitStack() as clients:
            for _ in range(3):
                connection = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE))
                connection.sendall(request)
            eventually(lambda: now(port) == (1, 2), "one inside, two wait")
        eventually(lambda: now(port) == (0, 0), "all have left")


def test_a_websocket(port: int) -> None:
    with connect(f"ws://127.0.0.1:{port}/m/v1/realtime") as client:
        client.send("hello")
        client.recv(timeout=DEADLINE)
    labels = {"model_id": "m", "route": "/v1/realtime", "status": "101", "outcome": "complete"}
    eventually(lambda: value(scraped(port), "fluidmcp_requests_total", **labels) == 1, "it is counted")
    chunks = value(scraped(port), "fluidmcp_response_chunks_total", model_id="m", route="/v1/realtime")
    assert chunks == 1


def test_a_histogram_is_cumulative_and_has_all() -> None:
    seen = Histogram()
    for seconds in (0.0, 0.005, 0.0051, 59.0, 601.0):
        seen.observe(seconds)
    assert sum(seen.counts) == 5
    assert seen.counts[0] == 2
    assert seen.counts[1] == 1
    assert seen.counts[BUCKETS.index(60.0)] == 1
    assert seen.counts[-1] == 1
    assert seen.sum == pytest.approx(660.0101)


def test_the_number_of_series_is_bounded(upstream: int) -> None:
    """Whatever clients think up; h11 takes any method."""

    def ask_oddly(port: int, number: int) -> None:
        headers = {"x-request-id": f"x{number}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=DEADLINE) as client:
            for path in (f"/x{number}/v1/models", f"/m/v1/x{number}", f"/v1/models/x{number}", f"/x{number}"):
                client.request("GET" if number % 2 else f"X{number}", path)

    def series(port: int, requests: int) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        """The gateway's own when so many requests, those for these not counted, are over."""
        total, found = 0.0, set()
        for (name, labels), count in scraped(port).items():
            total += count if name == "fluidmcp_requests_total" and ("route", "/metrics") not in labels else 0
            found |= {(name, labels)} if name.startswith("fluidmcp_") else set()
        return found if total == requests else set()

    with serving(remote(upstream), "uvicorn-h11") as port:
        scraped(port)
        for number in (7, 8):
            ask_oddly(port, number)
        before = eventually(lambda: series(port, 8), "they are over")
        for number in range(9, 19):
            ask_oddly(port, number)
        after = eventually(lambda: series(port, 48), "they are over")
    assert after == before
    assert not any("x17" in label for _, labels in after for _, label in labels)


def test_that_it_was_counted_outlives_a_restart_of_the_models(upstream: int) -> None:
    gateway = remote(upstream)
    for count in (1, 2):
        with TestClient(gateway) as client:
            client.get("/m/v1/models")
            labels = {"model_id": "m", "route": "/v1/models", "status": "200", "outcome": "complete"}
            assert value(samples_of(client.get("/metrics").text), "fluidmcp_requests_total", **labels) == count
