"""What is done for a request to a model: its body, its lease, what its server gets to see, and the relay over it.

Where it goes has been decided before, or is by its body; what the relay does is in ``relay`` and ``websocket``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.gateway.accounts import Accounts
from fluidmcp_proxy.gateway.body import ClientDisconnected, RequestBody
from fluidmcp_proxy.gateway.departure import race_departure
from fluidmcp_proxy.gateway.loading import asks_for_progress, what_it_does
from fluidmcp_proxy.gateway.relay import AnswerTruncated, Outgoing, Relay
from fluidmcp_proxy.gateway.request import Request
from fluidmcp_proxy.gateway.routes import Forward
from fluidmcp_proxy.gateway.target import Target
from fluidmcp_proxy.gateway.unified import choose_model
from fluidmcp_proxy.gateway.websocket import HANDSHAKE_HEADERS, Handshake, WebSocketRelay
from fluidmcp_proxy.models.fleet import Fleet
from fluidmcp_proxy.models.scheduler import Lease
from fluidmcp_proxy.upstream.endings import HandshakeRefused
from fluidmcp_proxy.upstream.headers import request_headers

if TYPE_CHECKING:
    from fluidmcp_proxy.gateway.tracing import Trace

__all__ = ["Forwarding"]

# What X-Forwarded-Proto calls the schemes of WebSocket scopes.
_HTTP_SCHEMES = {"ws": "http", "wss": "https"}


class Forwarding:
    """The way of requests to the models of a gateway.

    ``running`` gives its fleet, or raises ``LifespanNotRunning``. Every method raises a ``GatewayError`` that is still
    to be answered; otherwise the request has been accounted for when it returns or raises.
    """

    def __init__(self, running: Callable[[], Fleet], accounts: Accounts, begin_trace: type[Trace] | None) -> None:
        self._running = running
        self._accounts = accounts
        self._begin_trace = begin_trace

    async def forward(self, route: Forward, request: Request, body: RequestBody | None = None) -> None:
        """Forward an HTTP request, whose ``body`` may have been looked into already."""
        body = body or body_of(request)
        request.model = route.model
        lease = request.lease = self._running().scheduler.lease(route.model, wait=request.preferred_wait)
        news = (lambda: what_it_does(lease.status)) if asks_for_progress(request.noted) else None
        method = request.scope["method"].encode("ascii")
        outgoing = Outgoing(method, route.target, _headers(route, request), request.id, request.anthropic)
        trace = None if self._begin_trace is None else self._traced(request, lease)
        writer_of = (request.scope.get("extensions") or {}).get("fluidmcp.write")
        await self._run(Relay(outgoing, body, lease, request.send, news, trace, writer_of), request)

    async def forward_by_name(self, target: Target, request: Request) -> None:
        """Forward an HTTP request to the model that it names itself."""
        catalog, body = request.visitor.seen(self._running().catalog), body_of(request)
        introduce = partial(self._introduce, request, body)
        model, request.headers = await choose_model(catalog, body, request.headers, target.query, introduce)
        await self.forward(request.visitor.router.named(model, request.scope["method"], target), request, body)

    async def converse(self, route: Forward, request: Request) -> None:
        """Forward a WebSocket."""
        lease = request.lease = self._running().scheduler.lease(route.model, wait=request.preferred_wait)
        lease.owes_answer = False
        offered, spent = request.scope.get("subprotocols") or (), request.visitor.keys.subprotocols
        handshake = Handshake(
            route.target,
            _headers(route, request),
            [word for word in offered if word not in spent],
            request.id,
            request.table.config.settings.max_body_bytes,
        )
        trace = None if self._begin_trace is None else self._traced(request, lease)
        await self._run(WebSocketRelay(handshake, lease, request.receive, request.send, trace), request)

    async def _introduce(self, request: Request, body: RequestBody, model: str) -> None:
        """Wait until ``model`` is ready, as a request to it does, and learn what its server calls itself."""
        fleet, request.model = self._running(), model
        lease = fleet.scheduler.lease(model, wait=request.preferred_wait)
        race = race_departure(body.client_left)
        lease.interrupt = race.interrupt
        async with race:
            async with lease:
                await fleet.catalog.meet(model)
            return
        raise lease.shutting_down() if lease.was_cut else ClientDisconnected

    def _traced(self, request: Request, lease: Lease) -> Trace:
        assert self._begin_trace is not None
        request.trace = self._begin_trace(request.headers, request.elapsed, lease, lambda: lease.status)
        return request.trace

    async def _run(self, relay: Relay | WebSocketRelay, request: Request) -> None:
        try:
            await relay.run()
        except (GatewayError, HandshakeRefused):
            raise  # it will be answered
        except BaseException as error:  # aborted, or cancelled by the ASGI server
            outcome = relay.outcome if isinstance(error, AnswerTruncated) else "cut"
            self._accounts.close(request, relay.status or None, outcome, relay.code)
            raise
        self._accounts.close(request, relay.status or None, relay.outcome, relay.code)


def body_of(request: Request) -> RequestBody:
    """The body of ``request``, within the limits of its configuration; raises as ``RequestBody`` does."""
    settings = request.table.config.settings
    return RequestBody(request.receive, request.noted, settings.max_body_bytes, settings.body_timeout)


def _headers(route: Forward, request: Request) -> list[tuple[bytes, bytes]]:
    """What the model's server gets to see."""
    scope, table, spent = request.scope, request.table, request.visitor.keys.headers
    client, scheme = scope.get("client"), scope.get("scheme", "http")
    if scope["type"] == "websocket":
        spent |= HANDSHAKE_HEADERS
        scheme = _HTTP_SCHEMES.get(scheme, scheme)
    return request_headers(
        request.headers,
        host=table.hosts[route.model],
        client=client[0] if client else None,
        scheme=scheme,
        drop=spent,
        request_id=request.id,
        authorization=table.authorizations[route.model],
        http_version=scope.get("http_version", "1.1"),
    )
