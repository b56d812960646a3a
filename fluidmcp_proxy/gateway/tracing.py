"""OpenTelemetry spans of a request: all of it, its time in the queue, the load it waited for, the exchange upstream.

Imported only with the setting ``tracing``. Who exports the spans is the host's business: this speaks to
OpenTelemetry's API, and where no SDK is set up, nothing is recorded.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode

from fluidmcp_proxy.gateway.record import RequestRecord
from fluidmcp_proxy.models.lease import Lease
from fluidmcp_proxy.models.state import ModelStatus
from fluidmcp_proxy.upstream.client import Body, Headers, Response, Transport
from fluidmcp_proxy.upstream.websocket import WebSocket

__all__ = ["Trace"]

_tracer = trace.get_tracer("fluidmcp_proxy")  # whatever provider is set later


class Trace:
    """The spans of one request, which began ``elapsed`` seconds ago with ``headers`` and holds ``lease``.

    ``status`` tells of its model, whose load becomes a span if the request has waited for it.
    """

    def __init__(self, headers: Headers, elapsed: float, lease: Lease, status: Callable[[], ModelStatus]) -> None:
        self._lease = lease
        self._status = status
        self._waited = 0.0  # what of the lease's waiting has a span already
        asked = propagate.extract(_carried(headers))
        began = time.time_ns() - int(elapsed * 1e9)
        self._span = _tracer.start_span("request", asked, SpanKind.SERVER, start_time=began)
        self._context = trace.set_span_in_context(self._span, asked)

    def over(self, transport: Transport) -> Transport:
        """``transport``, with a span around what goes over it; the wait for it is over."""
        self._tell_wait()
        return _TracedTransport(self, transport)

    def end(self, record: RequestRecord) -> None:
        """The request is over."""
        self._tell_wait()
        span = self._span
        span.update_name(f"{record.method} {record.route}")
        span.set_attributes(
            {
                "http.request.method": record.method,
                "http.route": record.route,
                "fluidmcp.model_id": record.model,
                "fluidmcp.request_id": record.request_id,
                "fluidmcp.outcome": record.outcome,
                "fluidmcp.code": record.code,
            }
        )
        if record.status is not None:
            span.set_attribute("http.response.status_code", record.status)
        if record.outcome in ("upstream_died", "cut") or (record.status or 0) >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()

    @contextmanager
    def upstream(self, headers: Headers) -> Iterator[tuple[Span, Headers]]:
        """The span of one exchange, and ``headers`` in which it is the parent."""
        span = _tracer.start_span("upstream", self._context, SpanKind.CLIENT)
        try:
            yield span, _injected(headers, trace.set_span_in_context(span, self._context))
        except Exception:
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def _tell_wait(self) -> None:
        waited, self._waited = self._lease.waited - self._waited, self._lease.waited
        if waited <= 0:
            return
        now = time.time_ns()
        began = now - int(waited * 1e9)
        queue = _tracer.start_span("queue", self._context, start_time=began)
        status = self._status()
        ready = int(status.since * 1e9)
        if status.load_seconds is not None and began < ready <= now:
            below = trace.set_span_in_context(queue, self._context)
            load = _tracer.start_span("load", below, start_time=ready - int(status.load_seconds * 1e9))
            load.end(ready)
        queue.end(now)


class _TracedTransport:
    """See ``Transport``."""

    def __init__(self, request: Trace, transport: Transport) -> None:
        self._request = request
        self._transport = transport

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        """See ``Transport.exchange``."""
        with self._request.upstream(headers) as (span, sent):
            async with self._transport.exchange(method, target, sent, body) as response:
                span.set_attribute("http.response.status_code", response.status)
                yield response

    @asynccontextmanager
    async def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AsyncIterator[WebSocket]:
        """See ``Transport.open_websocket``."""
        with self._request.upstream(headers) as (_, sent):
            opened = self._transport.open_websocket(target, sent, subprotocols, max_message=max_message)
            async with opened as websocket:
                yield websocket

    async def aclose(self) -> None:
        """Leave the connections to their owner."""


def _carried(headers: Headers) -> dict[str, str]:
    """The headers that the configured propagators read. One that comes twice is a list (RFC 9110 §5.3)."""
    fields = propagate.get_global_textmap().fields
    carried: dict[str, str] = {}
    for name, value in headers:
        if (field := name.decode("latin-1")) in fields:
            text = value.decode("latin-1")
            carried[field] = f"{carried[field]},{text}" if field in carried else text
    return carried


def _injected(headers: Headers, context: Context) -> Headers:
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    set_here = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in carrier.items()]
    replaced = {name for name, _ in set_here}
    return [*(pair for pair in headers if pair[0] not in replaced), *set_here]
