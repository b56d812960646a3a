"""Spans of requests with tracing on, and what crosses with it off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fluidmcp_proxy import ConfigError, Gateway
from fluidmcp_proxy.config import settings
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway import tracing
from tests.gateway.records import Records
from tests.serving import DEADLINE, STUB, eventually, free_port, raw_exchange, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
HEADERS = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
CHAT = "/m/v1/chat/completions"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def gateway(port: int, *, on: bool = True, **keys: Any) -> Gateway:
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}, **keys}
    return Gateway(parse_config({"llmModels": {"m": entry}, "gateway": {"tracing": on}}, environ={}))


def finished(spans: InMemorySpanExporter, count: int) -> dict[str, ReadableSpan]:
    """By name; a span that never ends fails here."""
    eventually(lambda: len(spans.get_finished_spans()) >= count, f"{count} spans have ended")
    found = spans.get_finished_spans()
    assert len(found) == count
    return {span.name: span for span in found}


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    assert f"{context.trace_id:032x}" == TRACE
    return context.span_id


def received(port: int) -> dict[str, str]:
    """The headers that the model's server got."""
    answer = httpx.get(f"http://127.0.0.1:{port}/m/v1/echo", headers=HEADERS, timeout=DEADLINE)
    return {name: text for name, text in answer.json()["headers"] if name.startswith("trace")}


def test_without_tracing_it_crosses_as_it_is(upstream: int) -> None:
    with serving(gateway(upstream, on=False)) as port:
        assert received(port) == HEADERS


def test_the_server_becomes_a_child_of_the_upstream_span(upstream: int, spans: InMemorySpanExporter) -> None:
    with serving(gateway(upstream)) as port:
        told = received(port)
        got = finished(spans, 2)
    request, exchange = got["GET other"], got["upstream"]
    assert parent_of(request) == int(PARENT, 16)
    assert parent_of(exchange) == id_of(request)
    assert (request.kind, exchange.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert told == {"traceparent": f"00-{TRACE}-{id_of(exchange):016x}-01", "tracestate": "vendor=1"}
    assert request.attributes is not None
    assert (request.attributes["fluidmcp.model_id"], request.attributes["http.response.status_code"]) == ("m", 200)
    assert request.start_time is not None
    assert exchange.start_time is not None
    assert exchange.end_time is not None
    assert request.end_time is not None
    assert request.start_time <= exchange.start_time <= exchange.end_time <= request.end_time


def test_a_load_that_was_waited_for(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    arguments = ["serve", "m", "--port", str(free_port()), "--load-time", "0.3"]
    model = {"command": sys.executable, "args": [str(STUB), *arguments], "start": "on_demand"}
    folders = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run")}
    config = parse_config({"llmModels": {"m": model}, "gateway": {"tracing": True, **folders}}, environ={})
    with serving(Gateway(config)) as port:
        received(port)
        got = finished(spans, 4)
    request, queue, load, exchange = (got[name] for name in ("GET other", "queue", "load", "upstream"))
    assert (parent_of(queue), parent_of(load)) == (id_of(request), id_of(queue))
    assert load.start_time is not None
    assert load.end_time is not None
    assert queue.end_time is not None
    assert exchange.start_time is not None
    assert load.end_time - load.start_time > 0.3e9
    assert load.end_time <= queue.end_time <= exchange.start_time


def test_a_wait_that_was_in_vain(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    model = {"command": sys.executable, "args": [str(STUB), "serve", "--port", str(free_port()), "--never-ready"]}
    folders = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run")}
    config = parse_config({"llmModels": {"m": model}, "gateway": {"tracing": True, **folders}}, environ={})
    with serving(Gateway(config)) as port:
        headers = {**HEADERS, "prefer": "wait=0"}
        assert httpx.get(f"http://127.0.0.1:{port}/m/v1/echo", headers=headers, timeout=DEADLINE).status_code == 503
        got = finished(spans, 2)
    assert set(got) == {"GET other", "queue"}
    assert got["GET other"].status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("how", ["dies", "unreachable", "leaves"])
def test_spans_end_however_a_request_does(upstream: int, spans: InMemorySpanExporter, how: str) -> None:
    stub = {"cut-after": 300} if how == "dies" else {"hang-after": 2}
    body = json.dumps({"messages": [], "stream": True, "max_tokens": 9, "stub": stub}).encode()
    request = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with serving(gateway(free_port() if how == "unreachable" else upstream)) as port:
        if how == "leaves":
            with httpx.stream("POST", f"http://127.0.0.1:{port}{CHAT}", content=body, timeout=DEADLINE) as answer:
                next(answer.iter_raw())
        elif how == "dies":
            raw_exchange(port, request)
        else:
            httpx.post(f"http://127.0.0.1:{port}{CHAT}", content=body, timeout=DEADLINE)
        eventually(lambda: any(span.kind is SpanKind.SERVER for span in spans.get_finished_spans()), "it has ended")
    ended = {span.kind: span.status.status_code for span in spans.get_finished_spans()}
    expected = StatusCode.UNSET if how == "leaves" else StatusCode.ERROR
    assert ended == {SpanKind.SERVER: expected, SpanKind.CLIENT: expected}


def test_a_websocket(upstream: int, spans: InMemorySpanExporter) -> None:
    with serving(gateway(upstream)) as port:
        with connect(f"ws://127.0.0.1:{port}/m/v1/realtime", additional_headers=HEADERS) as client:
            client.send("hello")
            client.recv(timeout=DEADLINE)
        got = finished(spans, 2)
    assert parent_of(got["upstream"]) == id_of(got["WEBSOCKET /v1/realtime"])


WHERE = ("key", "upstream", "env", "argument", "output", "query", "header", "body", "answer", "method")
CANARY = {where: f"kanarie-{where}-0123456789abcdef" for where in WHERE}


def test_nothing_that_is_told_of_requests_has_a_secret(
    upstream: int, spans: InMemorySpanExporter, tmp_path: Path
) -> None:
    """No span has one in its name, attributes, events, links, status or resource; nor have access lines or metrics."""
    records = Records()
    with serving(with_secrets(upstream, tmp_path, records), "uvicorn-h11") as port:
        got = ask(port, "launched", "/v1/echo").text
        assert all(CANARY[where] in got for where in ("upstream", "query", "header")), "they have crossed"
        ask(port, "launched", content=chat(stream=True, max_tokens=3))
        ask(port, "launched", content=b"{" + CANARY["body"].encode())
        ask(port, "remote", "/v1/replay", content=CANARY["answer"].encode())
        ask(port, "remote", "/v1/raw", content=CANARY["answer"].encode())
        ask(port, "remote", content=chat(stub={"cut-after": 300}, stream=True, max_tokens=50))
        ask(port, "remote", "/v1/echo", method=CANARY["method"].upper())
        ask(port, "nowhere")
        assert "crashed" in ask(port, "broken").text
        ask(port, "launched", headers={"prefer": "wait=0"})
        with talking(port) as client:
            client.send(CANARY["body"])
            client.close(4000, CANARY["body"])
        with talking(port) as client:
            client.send("stub:raw " + CANARY["answer"].encode().hex())
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=DEADLINE)
        with pytest.raises(InvalidStatus), talking(port, **{"x-stub-status": "500"}):
            pass
        requests = 13
        eventually(lambda: len(of_requests(spans)) == len(records.seen) == requests, "all have ended")
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=secret_headers(), timeout=DEADLINE).text
    outcomes = {span.attributes["fluidmcp.outcome"] for span in of_requests(spans) if span.attributes}
    assert outcomes >= {"complete", "upstream_died", "refused"}
    exported = "".join(span.to_json() for span in spans.get_finished_spans())
    assert "fluidmcp.outcome" in exported
    assert "fluidmcp_requests_total" in metrics
    for told in (exported, "\n".join(map(str, records.seen)), metrics):
        assert "kanarie" not in told.lower()


def with_secrets(upstream: int, folder: Path, report: Records) -> Gateway:
    started = {"command": sys.executable, "restart_policy": "no", "env": {"HF_TOKEN": CANARY["env"]}}
    args = [str(STUB), "serve", "--port", str(free_port()), "--hf-token", CANARY["argument"]]
    models = {
        "launched": {**started, "args": [*args, "--api-key", CANARY["upstream"]], "api_key": CANARY["upstream"]},
        "broken": {**started, "args": [*args[:3], str(free_port()), "--crash", f"crashed {CANARY['output']}"]},
        "remote": {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}},
        "nowhere": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}},
    }
    settings = {"tracing": True, "api_keys": [CANARY["key"]]}
    folders = {"log_dir": str(folder / "log"), "runtime_dir": str(folder / "run")}
    config = parse_config({"llmModels": models, "gateway": {**settings, **folders}}, environ={})
    return Gateway(config, report=report)


def secret_headers(**more: str) -> dict[str, str]:
    return {"x-api-key": CANARY["key"], "x-secret": CANARY["header"], "baggage": f"user={CANARY['header']}", **more}


def chat(**keys: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": CANARY["body"]}], **keys}).encode()


def ask(
    port: int,
    model: str,
    path: str = "/v1/chat/completions",
    *,
    method: str = "POST",
    content: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """The answer, or what came of it before it broke off."""
    url = f"http://127.0.0.1:{port}/{model}{path}?token={CANARY['query']}"
    headers = secret_headers(**(headers or {}))
    content = chat() if content is None else content
    with httpx.stream(method, url, content=content, headers=headers, timeout=DEADLINE) as answer:
        try:
            answer.read()
        except httpx.RemoteProtocolError:
            pass
        return answer


def talking(port: int, **headers: str) -> ClientConnection:
    url = f"ws://127.0.0.1:{port}/remote/v1/realtime?token={CANARY['query']}"
    return connect(url, additional_headers=secret_headers(**headers), proxy=None)


def of_requests(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]


def test_opentelemetry_is_imported_only_when_it_is_wanted() -> None:
    code = """
import sys
from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
models = {"m": {"endpoints": {"base_url": "http://127.0.0.1:1/v1"}}}
for on in (False, True):
    Gateway(parse_config({"llmModels": models, "gateway": {"tracing": on}}, environ={}))
    assert ("opentelemetry" in sys.modules) is on
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_without_opentelemetry_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        gateway(1)
    assert (caught.value.code, caught.value.path) == ("invalid_value", "gateway.tracing")
    assert "fluidmcp-proxy[otel]" in caught.value.remedy
    gateway(1, on=False)
