"""What goes with a request through the gateway: the server's side of it, whose it is, and what will be told of it."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fluidmcp_proxy.errors import GatewayError, UpstreamError
from fluidmcp_proxy.gateway.entrance import Entrance, Visitor
from fluidmcp_proxy.gateway.record import RequestRecord
from fluidmcp_proxy.gateway.routing import speaks_anthropic
from fluidmcp_proxy.gateway.table import Table
from fluidmcp_proxy.gateway.target import Target
from fluidmcp_proxy.models.scheduler import Lease
from fluidmcp_proxy.upstream.headers import pick_request_id

if TYPE_CHECKING:
    from fluidmcp_proxy.gateway.tracing import Trace

__all__ = ["Request"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_NOTED = frozenset(
    {b"content-length", b"host", b"origin", b"prefer", b"transfer-encoding", b"upgrade", b"x-request-id"}
)
"""Headers that the gateway itself reads."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
"""Those of RFC 9110 §9.3 and RFC 5789: all that is told of a method, since a client may make up any other."""
_WAIT = re.compile(rb"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE).search


class Request:
    """One HTTP or WebSocket request, from its scope to its record."""

    __slots__ = (
        "_began",
        "anthropic",
        "headers",
        "id",
        "key",
        "lease",
        "model",
        "noted",
        "receive",
        "route",
        "scope",
        "send",
        "table",
        "trace",
        "visitor",
    )

    visitor: Visitor
    """Not there before it is known who that is, so that nothing is done for nobody."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, table: Table) -> None:
        self.table = table
        self._began = time.perf_counter()
        self.scope = scope
        self.receive = receive
        self.send = send
        # A list of its own: uvicorn with httptools adds the trailers of a chunked body to the scope's while it is read.
        self.headers: list[tuple[bytes, bytes]] = [*scope["headers"]]
        self.noted = [pair for pair in self.headers if pair[0] in _NOTED]
        self.id = pick_request_id(self.noted)
        self.anthropic = speaks_anthropic(scope["path"])
        self.route = self.model = self.key = "-"
        self.lease: Lease | None = None
        self.trace: Trace | None = None

    def identify(self, entrance: Entrance, target: Target) -> None:
        """Find out whose it is. Raises ``InvalidApiKey``."""
        self.visitor = entrance.identify(self.scope, self.headers, target)
        self.key = self.visitor.keys.name

    @property
    def elapsed(self) -> float:
        """Seconds since it came."""
        return time.perf_counter() - self._began

    @property
    def preferred_wait(self) -> float | None:
        """Seconds of ``Prefer: wait=N`` (RFC 7240 §4.3)."""
        for name, value in self.noted:
            if name == b"prefer" and (match := _WAIT(value)):
                return float(match[1])
        return None

    def outcome_of(self, error: GatewayError) -> str:
        """How a request ends that is answered with ``error``."""
        if isinstance(error, UpstreamError):
            return "upstream_died"
        return "cut" if self.lease is not None and self.lease.was_cut else "refused"

    @property
    def _method(self) -> str:
        if self.scope["type"] == "websocket":
            return "WEBSOCKET"
        method: str = self.scope["method"]
        return method if method in _METHODS else "other"

    def record(self, status: int | None, outcome: str, code: str) -> RequestRecord:
        """What is known of it, now that it is over."""
        began, lease, seconds = self._began, self.lease, self.elapsed
        about = self.id.decode(), self._method, self.route, self.model, status
        if lease is None:
            return RequestRecord(*about, 0, 0, seconds, None, None, outcome, code, self.key)
        first, sent = lease.first_byte_at, (lease.bytes_answered, lease.chunks_answered)
        ttfb = None if first is None else first - began
        return RequestRecord(*about, *sent, seconds, ttfb, lease.waited, outcome, code, self.key)
