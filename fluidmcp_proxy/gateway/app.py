"""The gateway as an ASGI app: puts the rooms together, and turns every exception into an answer, here only."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fluidmcp_proxy.config.difference import Difference, difference, in_force
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.errors import GatewayError, LifespanNotRunning, ShuttingDown
from fluidmcp_proxy.gateway import events, pages
from fluidmcp_proxy.gateway.access import ServedBy
from fluidmcp_proxy.gateway.administration import act, send_logs
from fluidmcp_proxy.gateway.answers import respond, respond_with_error
from fluidmcp_proxy.gateway.body import ClientDisconnected, RequestBody
from fluidmcp_proxy.gateway.cors import answering, preflight
from fluidmcp_proxy.gateway.departure import race_departure
from fluidmcp_proxy.gateway.entrance import Entrance
from fluidmcp_proxy.gateway.lifespan import serve_lifespan
from fluidmcp_proxy.gateway.loading import asks_for_progress, what_it_does
from fluidmcp_proxy.gateway.record import RequestRecord, log_request
from fluidmcp_proxy.gateway.relay import AnswerTruncated, Outgoing, Relay
from fluidmcp_proxy.gateway.request import Request
from fluidmcp_proxy.gateway.routing import (
    Action,
    Forward,
    ListedModel,
    Logs,
    ModelPage,
    Page,
    StaticFile,
    Unified,
)
from fluidmcp_proxy.gateway.table import Table
from fluidmcp_proxy.gateway.tally import Tally
from fluidmcp_proxy.gateway.target import Target, read_target
from fluidmcp_proxy.gateway.unified import choose_model
from fluidmcp_proxy.gateway.websocket import HANDSHAKE_HEADERS, Handshake, WebSocketRelay, refuse
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.fleet import Fleet, open_fleet
from fluidmcp_proxy.models.scheduler import Lease
from fluidmcp_proxy.models.state import ModelStatus
from fluidmcp_proxy.upstream.client import Body, Headers, Response, open_client
from fluidmcp_proxy.upstream.endings import HandshakeRefused
from fluidmcp_proxy.upstream.headers import request_headers, response_headers

if TYPE_CHECKING:
    import httpx

    from fluidmcp_proxy.gateway.tracing import Trace

__all__ = ["Gateway"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("fluidmcp_proxy.gateway")

# What X-Forwarded-Proto calls the schemes of WebSocket scopes.
_HTTP_SCHEMES = {"ws": "http", "wss": "https"}


class Gateway:
    """An ASGI app that runs the models of ``config`` inside its lifespan and forwards requests to them.

    Mounted in another app, whose server runs no lifespan for it, ``run()`` or ``lifespan`` has to be part of the host's
    own lifespan. One gateway runs once at a time, but may run again after it has ended. ``served_by`` says whether
    somebody else looks at the Host and Origin of requests; ``report`` is called with what is known of each request that
    is over, and logs it by default.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        served_by: ServedBy = ServedBy.HOST_APP,
        report: Callable[[RequestRecord], None] = log_request,
    ) -> None:
        self._report = report
        self._served_by = served_by
        self._table = Table(config, served_by)
        self._fleet: Fleet | None = None
        self._feed: events.Feed | None = None
        self._tally = Tally()
        self._begin_trace = _trace_type() if config.settings.tracing else None
        self._clients: dict[str, httpx.AsyncClient] = {}

    @property
    def config(self) -> GatewayConfig:
        """What it runs."""
        return self._table.config

    def __repr__(self) -> str:
        return f"<Gateway {', '.join(self.config.models)} {'running' if self._fleet else 'not running'}>"

    # Life

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Gateway]:
        """Start the models and yield at once; leaving drains and stops them all.

        Raises:
            AlreadyOwned: another gateway runs this configuration.
            RuntimeError: this one runs already.
        """
        if self._fleet is not None:
            raise RuntimeError("this gateway is running already; compose its lifespan once")
        _exposition()  # now, not under load
        for warning in self.config.warnings:
            logger.warning("%s", warning)
        try:
            async with open_fleet(self.config) as self._fleet:
                self._feed = events.Feed(self._fleet, self._tally)
                yield self
        finally:
            self._fleet = self._feed = None

    def lifespan(self, app: object) -> AbstractAsyncContextManager[None]:
        """``run()`` with the signature of Starlette's and FastAPI's ``lifespan`` parameter."""
        return _without_value(self.run())

    def begin_shutdown(self) -> None:
        """Refuse new requests and begin to drain, before the server has called the end of the lifespan.

        To be called in the event loop that the gateway runs in.
        """
        if self._fleet is not None:
            self._fleet.close()

    def reload(self, config: GatewayConfig) -> Difference:
        """Run ``config`` from now on; what has not changed goes on without a pause.

        Models that changed are drained and replaced, requests for them wait meanwhile; those that are gone are drained
        and stopped. Settings that cannot change at run time stay as they are and are named in the answer. To be called
        in the event loop that the gateway runs in.

        Raises:
            FluidMCPError: this gateway cannot run it. Then nothing has changed.
        """
        fleet = self._running()
        if fleet.closing:
            raise ShuttingDown("The gateway is shutting down.", retry_after=5)
        found = difference(self.config, config)
        config = config.model_copy(update={"settings": in_force(self.config.settings, config.settings)})
        table = Table(config, self._served_by)
        fleet.apply(config)
        self._table = table
        for name in (*found.changed, *found.removed):
            self._clients.pop(name, None)
        counts = len(found.added), len(found.changed), len(found.removed)
        logger.info("another configuration: %d models added, %d changed, %d removed", *counts)
        for warning in config.warnings:
            logger.warning("%s", warning)
        if found.needs_restart:
            logger.warning("unchanged until a restart: %s", ", ".join(found.needs_restart))
        return found

    def status(self, model: str) -> ModelStatus:
        """A snapshot of one model. Raises ``KeyError`` for an unknown one, ``LifespanNotRunning``."""
        return self._running().scheduler.statuses()[model]

    def client(self, model: str) -> httpx.AsyncClient:
        """An ``httpx.AsyncClient`` to one model for the host's own code, over the gateway's connections.

        Its base URL is the server's ``/v1``; a request waits for a loading model. Close it or not: the connections
        are the gateway's. Raises ``KeyError`` for an unknown model.
        """
        client = self._clients.get(model)
        if client is None or client.is_closed:
            address = address_of(self.config.models[model])
            client = self._clients[model] = open_client(_LeasedTransport(self, model), address)
        return client

    # Requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            await self._answer(self._table.entrance, scope, receive, send)
        elif scope["type"] == "lifespan":
            await serve_lifespan(self.run(), receive, send)
        elif scope["type"] == "websocket":
            await receive()  # websocket.connect
            await self._connect(scope, receive, send)

    async def control(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI for the user who runs the gateway, without keys: to be served where nobody else comes."""
        await self._answer(self._table.owners_entrance, scope, receive, send)

    def claims(self, scope: Scope) -> bool:
        """Whether the path of ``scope`` begins with the id of a model."""
        try:
            return self._table.entrance.router.knows(read_target(scope))
        except GatewayError:
            return False

    async def _answer(self, entrance: Entrance, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send, self._table)
        origin = self._tell_browsers(request) if entrance.lists_origins else None
        try:
            target = entrance.admit(scope, request.headers, request.noted)
            if origin is not None and (allowed := preflight(scope["method"], request.headers)) is not None:
                await respond(request.send, 200, b"", request.id, allowed)
                self._end(request, 200, "complete")
                return
            request.identify(entrance, target)
            route = request.visitor.router.route(scope["method"], target)
            request.route = route.label
            if isinstance(route, Forward):
                await self._forward(route, request, self._body(request))
            elif isinstance(route, Unified):
                await self._forward_by_name(target, request)
            elif isinstance(route, Logs):
                request.visitor.require_admin()
                await send_logs(self._running(), route.model, target.query, scope["method"], request)
                self._end(request, 200, "complete")
            elif route is Page.MODELS and events.wants_events(scope["method"], request.headers):
                await self._show_events(request)
            else:
                status, body, media_type, headers = await self._page(route, request)
                wants_body = scope["method"] != "HEAD"
                await respond(
                    request.send, status, body, request.id, headers, media_type=media_type, with_body=wants_body
                )
                self._end(request, status, "complete")
        except ClientDisconnected:
            self._end(request, None, "client_left")
        except GatewayError as error:
            await respond_with_error(scope, request.send, error, request_id=request.id, anthropic=request.anthropic)
            self._end(request, error.status, request.outcome_of(error), error.code)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send, self._table)
        entrance = request.table.entrance
        try:
            target = entrance.admit(scope, request.headers, request.noted)
            request.identify(entrance, target)
            route = request.visitor.router.route_websocket(target)
            request.route, request.model = route.label, route.model
            await self._converse(route, request)
        except GatewayError as error:
            fields = [(b"content-type", b"application/json"), *error.headers, (b"x-request-id", request.id)]
            await refuse(scope, send, error.status, fields, error.body(anthropic=request.anthropic))
            self._end(request, error.status, request.outcome_of(error), error.code)
        except HandshakeRefused as refusal:
            headers = response_headers(refusal.headers, request_id=request.id)
            fields = [pair for pair in headers if pair[0] not in HANDSHAKE_HEADERS]
            await refuse(scope, send, refusal.status, fields, refusal.body)
            if request.lease is not None and refusal.body:
                request.lease.count(len(refusal.body))
            self._end(request, refusal.status, "complete")

    async def _converse(self, route: Forward, request: Request) -> None:
        lease = self._running().scheduler.lease(route.model, wait=request.preferred_wait)
        lease.owes_answer = False
        request.lease = lease
        handshake = Handshake(
            route.target,
            self._headers(route, request),
            [word for word in request.scope.get("subprotocols") or () if word not in request.visitor.keys.subprotocols],
            request.id,
            self.config.settings.max_body_bytes,
        )
        relay = WebSocketRelay(handshake, lease, request.receive, request.send, self._trace(request, lease))
        await self._run(relay, request)

    def _tell_browsers(self, request: Request) -> bytes | None:
        """Let a listed site's pages read the answer; the page's origin."""
        origin = request.table.entrance.listed_origin(request.noted)
        request.send = answering(request.send, origin)
        return origin

    async def _forward_by_name(self, target: Target, request: Request) -> None:
        catalog, body = request.visitor.seen(self._running().catalog), self._body(request)
        introduce = partial(self._introduce, request, body)
        model, request.headers = await choose_model(catalog, body, request.headers, target.query, introduce)
        route = request.visitor.router.named(model, request.scope["method"], target)
        await self._forward(route, request, body)

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

    async def _forward(self, route: Forward, request: Request, body: RequestBody) -> None:
        request.model = route.model
        lease = self._running().scheduler.lease(route.model, wait=request.preferred_wait)
        request.lease = lease
        wants_news = asks_for_progress(request.noted)
        news = (lambda: what_it_does(lease.status)) if wants_news else None
        trace = self._trace(request, lease)
        writer_of = (request.scope.get("extensions") or {}).get("fluidmcp.write")
        relay = Relay(self._outgoing(route, request), body, lease, request.send, news, trace, writer_of)
        await self._run(relay, request)

    def _trace(self, request: Request, lease: Lease) -> Trace | None:
        if self._begin_trace is not None:
            request.trace = self._begin_trace(request.headers, request.elapsed, lease, lambda: lease.status)
        return request.trace

    async def _run(self, relay: Relay | WebSocketRelay, request: Request) -> None:
        try:
            await relay.run()
        except (GatewayError, HandshakeRefused):
            raise  # it will be answered
        except BaseException as error:  # aborted, or cancelled by the ASGI server
            outcome = relay.outcome if isinstance(error, AnswerTruncated) else "cut"
            self._end(request, relay.status or None, outcome, relay.code)
            raise
        self._end(request, relay.status or None, relay.outcome, relay.code)

    def _end(self, request: Request, status: int | None, outcome: str, code: str = "-") -> None:
        """The one place where a request is accounted for. That a page was shown is counted, and has no line."""
        record = request.record(status, outcome, code)
        self._tally.count(record)
        if request.trace is not None:
            request.trace.end(record)
        is_page = record.model == "-" and outcome == "complete"
        if not is_page:
            self._report(record)

    def _body(self, request: Request) -> RequestBody:
        settings = self.config.settings
        return RequestBody(request.receive, request.noted, settings.max_body_bytes, settings.body_timeout)

    def _outgoing(self, route: Forward, request: Request) -> Outgoing:
        method = request.scope["method"].encode("ascii")
        return Outgoing(method, route.target, self._headers(route, request), request.id, request.anthropic)

    def _headers(self, route: Forward, request: Request) -> list[tuple[bytes, bytes]]:
        scope, client = request.scope, request.scope.get("client")
        scheme: str = scope.get("scheme", "http")
        spent = request.visitor.keys.headers
        if scope["type"] == "websocket":
            spent |= HANDSHAKE_HEADERS
        return request_headers(
            request.headers,
            host=request.table.hosts[route.model],
            client=client[0] if client else None,
            scheme=_HTTP_SCHEMES.get(scheme, scheme),
            drop=spent,
            request_id=request.id,
            authorization=request.table.authorizations[route.model],
            http_version=scope.get("http_version", "1.1"),
        )

    async def _page(
        self, route: Page | ModelPage | StaticFile | ListedModel | Action, request: Request
    ) -> pages.Answer:
        if route is Page.HEALTH:
            return pages.health()
        if isinstance(route, StaticFile):
            return pages.static(route.name)
        if route is Page.STATUS:
            path = request.scope["path"]
            return pages.static("page.html") if path.endswith("/") else pages.below_itself(path)
        fleet, visitor = self._running(), request.visitor
        names = visitor.router.names
        if route is Page.READY:
            ready = pages.ready(fleet.scheduler, names, closing=fleet.closing)
            return ready if visitor.is_known else ready._replace(body=b"")
        if route is Page.LIST or isinstance(route, ListedModel):
            catalog = visitor.seen(fleet.catalog)
            await catalog.refresh()
            return pages.listed(catalog, route.name) if isinstance(route, ListedModel) else pages.listing(catalog)
        if route is Page.METRICS:
            visitor.require_all()
            return pages.Answer(200, await _exposition()(self._tally, fleet), pages.PROMETHEUS)
        if isinstance(route, Action):
            visitor.require_admin()
            act(fleet, route.model, route.verb, request.key)
            return pages.model(fleet.scheduler, route.model)._replace(status=202)
        if isinstance(route, ModelPage):
            return pages.model(fleet.scheduler, route.model)
        return pages.models(fleet.scheduler, names)

    async def _show_events(self, request: Request) -> None:
        self._running()
        assert self._feed is not None
        visitor, request.route = request.visitor, events.LABEL
        event = partial(events.Snapshot.event, names=visitor.router.names, admin=visitor.is_admin)
        try:
            await events.show(self._feed, event, request.receive, request.send, request.id)
        finally:
            self._end(request, 200, "complete")

    def _running(self) -> Fleet:
        if self._fleet is None:
            raise LifespanNotRunning(
                "The gateway's lifespan is not running: the host app has to enter gateway.run() in its own lifespan."
            )
        return self._fleet


class _LeasedTransport:
    """A model's transport for ``Gateway.client``: each exchange holds a lease, as a request from outside does."""

    def __init__(self, gateway: Gateway, model: str) -> None:
        self._gateway = gateway
        self._model = model

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        lease = self._gateway._running().scheduler.lease(self._model)
        async with lease as transport, transport.exchange(method, target, headers, body) as response:
            yield response

    async def aclose(self) -> None:
        """Leave the connections to the gateway."""


def _trace_type() -> type[Trace]:
    """Imported when it is wanted: OpenTelemetry is an extra."""
    from fluidmcp_proxy.gateway.tracing import Trace

    return Trace


def _exposition() -> Callable[[Tally, Fleet], Awaitable[bytes]]:
    """Imported when a gateway runs: prometheus_client looks around in ``/proc`` when it is."""
    from fluidmcp_proxy.gateway.metrics import exposition

    return exposition


@asynccontextmanager
async def _without_value(context: AbstractAsyncContextManager[object]) -> AsyncIterator[None]:
    """Starlette takes what a lifespan yields for its state."""
    async with context:
        yield
