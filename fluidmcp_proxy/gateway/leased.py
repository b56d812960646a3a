"""The connections to a model for the host's own code: each exchange holds a lease, as a request from outside does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fluidmcp_proxy.models.fleet import Fleet
from fluidmcp_proxy.upstream.client import Body, Headers, Response

__all__ = ["LeasedTransport"]


class LeasedTransport:
    """A model's transport for ``Gateway.client``. ``running`` gives the gateway's fleet."""

    def __init__(self, running: Callable[[], Fleet], model: str) -> None:
        self._running = running
        self._model = model

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        """See ``HttpTransport.exchange``; waits for a loading model before."""
        lease = self._running().scheduler.lease(self._model)
        async with lease as transport, transport.exchange(method, target, headers, body) as response:
            yield response

    async def aclose(self) -> None:
        """Leave the connections to the gateway."""
