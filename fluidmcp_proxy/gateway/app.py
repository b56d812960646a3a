"""The gateway as an ASGI app: puts the rooms together, and turns every exception into an answer, here only."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fluidmcp_proxy.config.difference import Difference, difference, in_force
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.errors import GatewayError, LifespanNotRunning, ShuttingDown
from fluidmcp_proxy.gateway.access import ServedBy
from fluidmcp_proxy.gateway.accounts import Accounts
from fluidmcp_proxy.gateway.answers import respond, respond_with_error
from fluidmcp_proxy.gateway.body import ClientDisconnected
from fluidmcp_proxy.gateway.cors import answering, preflight
from fluidmcp_proxy.gateway.entrance import Entrance
from fluidmcp_proxy.gateway.events import wants_events
from fluidmcp_proxy.gateway.forwarding import Forwarding
from fluidmcp_proxy.gateway.leased import LeasedTransport
from fluidmcp_proxy.gateway.lifespan import serve_lifespan
from fluidmcp_proxy.gateway.record import RequestRecord, log_request
from fluidmcp_proxy.gateway.request import Request
from fluidmcp_proxy.gateway.routes import Forward, Page, Unified
from fluidmcp_proxy.gateway.site import Site, exposition
from fluidmcp_proxy.gateway.table import Table
from fluidmcp_proxy.gateway.target import read_target
from fluidmcp_proxy.gateway.websocket import HANDSHAKE_HEADERS, refuse
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.fleet import Fleet, open_fleet
from fluidmcp_proxy.models.state import ModelStatus
from fluidmcp_proxy.upstream.client import open_client
from fluidmcp_proxy.upstream.endings import HandshakeRefused
from fluidmcp_proxy.upstream.headers import response_headers

if TYPE_CHECKING:
    import httpx

    from fluidmcp_proxy.gateway.tracing import Trace

__all__ = ["Gateway"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("fluidmcp_proxy.gateway")


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
        self._served_by = served_by
        self._table = Table(config, served_by)
        self._fleet: Fleet | None = None
        self._accounts = Accounts(report)
        self._site = Site(self._running, self._accounts.tally)
        self._forwarding = Forwarding(self._running, self._accounts, _trace_type() if config.settings.tracing else None)
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
        exposition()  # now, not under load
        for warning in self.config.warnings:
            logger.warning("%s", warning)
        try:
            async with open_fleet(self.config) as self._fleet:
                self._site.open(self._fleet)
                yield self
        finally:
            self._fleet = None

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
            client = self._clients[model] = open_client(LeasedTransport(self._running, model), address)
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
        request, end = Request(scope, receive, send, self._table), self._accounts.close
        origin = self._tell_browsers(request) if entrance.lists_origins else None
        try:
            target = entrance.admit(scope, request.headers, request.noted)
            if origin is not None and (allowed := preflight(scope["method"], request.headers)) is not None:
                await respond(request.send, 200, b"", request.id, allowed)
                end(request, 200, "complete")
                return
            request.identify(entrance, target)
            route = request.visitor.router.route(scope["method"], target)
            request.route = route.label
            if isinstance(route, Forward):
                await self._forwarding.forward(route, request)
            elif isinstance(route, Unified):
                await self._forwarding.forward_by_name(target, request)
            elif route is Page.MODELS and wants_events(scope["method"], request.headers):
                await self._show_events(request)
            else:
                end(request, await self._site.answer(route, target, request), "complete")
        except ClientDisconnected:
            end(request, None, "client_left")
        except GatewayError as error:
            await respond_with_error(scope, request.send, error, request_id=request.id, anthropic=request.anthropic)
            end(request, error.status, request.outcome_of(error), error.code)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, end = Request(scope, receive, send, self._table), self._accounts.close
        entrance = request.table.entrance
        try:
            target = entrance.admit(scope, request.headers, request.noted)
            request.identify(entrance, target)
            route = request.visitor.router.route_websocket(target)
            request.route, request.model = route.label, route.model
            await self._forwarding.converse(route, request)
        except GatewayError as error:
            fields = [(b"content-type", b"application/json"), *error.headers, (b"x-request-id", request.id)]
            await refuse(scope, send, error.status, fields, error.body(anthropic=request.anthropic))
            end(request, error.status, request.outcome_of(error), error.code)
        except HandshakeRefused as refusal:
            headers = response_headers(refusal.headers, request_id=request.id)
            fields = [pair for pair in headers if pair[0] not in HANDSHAKE_HEADERS]
            await refuse(scope, send, refusal.status, fields, refusal.body)
            if request.lease is not None and refusal.body:
                request.lease.count(len(refusal.body))
            end(request, refusal.status, "complete")

    def _tell_browsers(self, request: Request) -> bytes | None:
        """Let a listed site's pages read the answer; the page's origin."""
        origin = request.table.entrance.listed_origin(request.noted)
        request.send = answering(request.send, origin)
        return origin

    async def _show_events(self, request: Request) -> None:
        self._running()
        try:
            await self._site.show_events(request)
        finally:
            self._accounts.close(request, 200, "complete")

    def _running(self) -> Fleet:
        if self._fleet is None:
            raise LifespanNotRunning(
                "The gateway's lifespan is not running: the host app has to enter gateway.run() in its own lifespan."
            )
        return self._fleet


def _trace_type() -> type[Trace]:
    """Imported when it is wanted: OpenTelemetry is an extra."""
    from fluidmcp_proxy.gateway.tracing import Trace

    return Trace


@asynccontextmanager
async def _without_value(context: AbstractAsyncContextManager[object]) -> AsyncIterator[None]:
    """Starlette takes what a lifespan yields for its state."""
    async with context:
        yield
