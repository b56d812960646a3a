"""The gateway whose configuration the environment names: what ``uvicorn fluidmcp_proxy:app`` serves."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fluidmcp_proxy.config.load import load_config
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.config.settings import configured_path
from fluidmcp_proxy.errors import LifespanNotRunning
from fluidmcp_proxy.gateway.access import ServedBy
from fluidmcp_proxy.gateway.answers import respond_with_error
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.gateway.lifespan import serve_lifespan

__all__ = ["EnvironmentGateway", "create_app"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def create_app(config: GatewayConfig | str | os.PathLike[str] | None = None) -> Gateway | EnvironmentGateway:
    """An ASGI app for a configuration, or for a file; without either for the file that ``FLUIDMCP_CONFIG`` names.

    Raises:
        ConfigError: the file that was given cannot be used. One that the environment names is read at start-up.
    """
    if config is None:
        return EnvironmentGateway()
    return Gateway(config if isinstance(config, GatewayConfig) else load_config(config))


class EnvironmentGateway:
    """Reads the file at start-up, so that importing reads nothing and a bad one is reported in one line."""

    def __init__(self) -> None:
        self.gateway: Gateway | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await serve_lifespan(self._run(), receive, send)
        elif self.gateway is not None:
            await self.gateway(scope, receive, send)
        elif scope["type"] == "http":
            error = LifespanNotRunning("The server has not run the lifespan of this app (lifespan=off?).")
            await respond_with_error(scope, send, error)

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        self.gateway = Gateway(load_config(configured_path()), served_by=ServedBy.ASGI_SERVER)
        try:
            async with self.gateway.run():
                yield
        finally:
            self.gateway = None
