"""What the gateway answers itself: its pages, what it tells of the models, what administrators ask for.

What the answers say is in ``pages``, ``events`` and ``administration``; what may be asked for has been decided before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fluidmcp_proxy.gateway import events, pages
from fluidmcp_proxy.gateway.administration import act, send_logs
from fluidmcp_proxy.gateway.answers import respond
from fluidmcp_proxy.gateway.request import Request
from fluidmcp_proxy.gateway.routes import Action, ListedModel, Logs, ModelPage, Page, StaticFile
from fluidmcp_proxy.gateway.tally import Tally
from fluidmcp_proxy.gateway.target import Target
from fluidmcp_proxy.models.fleet import Fleet

__all__ = ["Place", "Site", "exposition"]

Place = Page | ModelPage | StaticFile | ListedModel | Action | Logs


class Site:
    """The gateway's own answers, of what ``running`` gives: its fleet, or ``LifespanNotRunning``."""

    def __init__(self, running: Callable[[], Fleet], tally: Tally) -> None:
        self._running = running
        self._tally = tally
        self._feed: events.Feed | None = None

    def open(self, fleet: Fleet) -> None:
        """Tell of ``fleet`` from now on."""
        self._feed = events.Feed(fleet, self._tally)

    async def answer(self, place: Place, target: Target, request: Request) -> int:
        """Answer a request for ``place``; the status of the answer. Raises a ``GatewayError`` still to be answered."""
        method = request.scope["method"]
        if isinstance(place, Logs):
            request.visitor.require_admin()
            await send_logs(self._running(), place.model, target.query, method, request)
            return 200
        status, body, media_type, headers = await self._page(place, request)
        shown = method != "HEAD"
        await respond(request.send, status, body, request.id, headers, media_type=media_type, with_body=shown)
        return status

    async def show_events(self, request: Request) -> None:
        """The state of the models as it changes, until the client leaves, of a gateway that runs."""
        assert self._feed is not None
        visitor, request.route = request.visitor, events.LABEL
        event = partial(events.Snapshot.event, names=visitor.router.names, admin=visitor.is_admin)
        await events.show(self._feed, event, request.receive, request.send, request.id)

    async def _page(
        self, place: Page | ModelPage | StaticFile | ListedModel | Action, request: Request
    ) -> pages.Answer:
        if place is Page.HEALTH:
            return pages.health()
        if isinstance(place, StaticFile):
            return pages.static(place.name)
        if place is Page.STATUS:
            path = request.scope["path"]
            return pages.static("page.html") if path.endswith("/") else pages.below_itself(path)
        fleet, visitor = self._running(), request.visitor
        names = visitor.router.names
        if place is Page.READY:
            ready = pages.ready(fleet.scheduler, names, closing=fleet.closing)
            return ready if visitor.is_known else ready._replace(body=b"")
        if place is Page.LIST or isinstance(place, ListedModel):
            catalog = visitor.seen(fleet.catalog)
            await catalog.refresh()
            return pages.listed(catalog, place.name) if isinstance(place, ListedModel) else pages.listing(catalog)
        if place is Page.METRICS:
            visitor.require_all()
            return pages.Answer(200, await exposition()(self._tally, fleet), pages.PROMETHEUS)
        if isinstance(place, Action):
            visitor.require_admin()
            act(fleet, place.model, place.verb, request.key)
            return pages.model(fleet.scheduler, place.model)._replace(status=202)
        if isinstance(place, ModelPage):
            return pages.model(fleet.scheduler, place.model)
        return pages.models(fleet.scheduler, names)


def exposition() -> Callable[[Tally, Fleet], Awaitable[bytes]]:
    """Imported when a gateway runs: prometheus_client looks around in ``/proc`` when it is."""
    from fluidmcp_proxy.gateway.metrics import exposition

    return exposition
