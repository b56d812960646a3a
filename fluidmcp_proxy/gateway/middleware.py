"""The gateway as a middleware around another ASGI app."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.gateway.lifespan import surround_lifespan

__all__ = ["GatewayMiddleware"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class GatewayMiddleware:
    """Answers what is the gateway's and passes everything else to ``app``; the models live in the lifespan it sees.

    Without a ``prefix`` the gateway's are the paths below the configured models' ids; with ``prefix="/llm"``
    everything below that. ``gateway`` is the :class:`Gateway` inside, for ``client()`` and ``status()``.
    """

    def __init__(self, app: App, config: GatewayConfig, prefix: str = "") -> None:
        if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
            raise ValueError(f"a prefix begins with a slash and does not end with one, unlike {prefix!r}")
        self.app = app
        self.gateway = Gateway(config)
        self._prefix = prefix

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await surround_lifespan(self.gateway.run(), self.app, scope, receive, send)
        elif (inner := self._ours(scope)) is not None:
            await self.gateway(inner, receive, send)
        else:
            await self.app(scope, receive, send)

    def _ours(self, scope: Message) -> Message | None:
        """The scope as the gateway sees it, or None for the app's."""
        if scope["type"] not in ("http", "websocket"):
            return None
        if not self._prefix:
            return scope if self.gateway.claims(scope) else None
        root = scope.get("root_path", "").rstrip("/")
        path: str = scope["path"]
        below = path[len(root) :] if path.startswith(root) else path
        if below == self._prefix or below.startswith(self._prefix + "/"):
            return {**scope, "root_path": root + self._prefix}
        return None
