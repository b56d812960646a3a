"""The control socket of ``fluidmcp run``: the gateway for the user who runs it, and what only the command line asks.

It is there as long as the gateway, while that drains, too. Below it are the gateway's own routes, without keys.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
import uvicorn

from fluidmcp_proxy.cli.reload import Reload
from fluidmcp_proxy.errors import ConfigError, FluidMCPError
from fluidmcp_proxy.gateway.answers import respond
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.process.control_socket import reserved
from fluidmcp_proxy.upstream.headers import pick_request_id

__all__ = ["CONFIGURATION", "serve_control"]

CONFIGURATION = "configuration_error"
"""Type of the error of a file that cannot be used."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("fluidmcp_proxy.cli")


async def serve_control(gateway: Gateway, url: str, reload: Reload) -> None:
    """Serve the control socket of a running ``gateway``, which is at ``url``, until cancelled.

    Where there can be none, that is logged: the gateway does its work without.
    """
    config = gateway.config
    try:
        with reserved(config.settings.runtime_dir, config.identity) as path:
            await _Server(_Control(gateway, url, reload), path).serve()
    except (FluidMCPError, OSError) as error:
        logger.warning("no control socket, so `fluidmcp status` and the like do not work: %s", error)


class _Control:
    """ASGI: ``GET /`` says which gateway this is, ``POST /reload`` reads its file again; the rest is the gateway's."""

    def __init__(self, gateway: Gateway, url: str, reload: Reload) -> None:
        self._gateway = gateway
        self._reload = reload
        self._url = url

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"] == "/":
            config = self._gateway.config
            facts = {"pid": os.getpid(), "config": str(config.source or ""), "url": self._url}
            await respond(send, 200, json.dumps(facts).encode(), pick_request_id(scope["headers"]))
        elif scope["path"] == "/reload" and scope["method"] == "POST":
            status, told = self._reloaded()
            await respond(send, status, json.dumps(told).encode(), pick_request_id(scope["headers"]))
        else:
            await self._gateway.control(scope, receive, send)

    def _reloaded(self) -> tuple[int, object]:
        try:
            return 200, self._reload()._asdict()
        except FluidMCPError as error:
            code = error.code if isinstance(error, ConfigError) else "not_reloaded"
            return 400, {"error": {"message": str(error), "code": code, "type": CONFIGURATION}}


class _Server(uvicorn.Server):
    """uvicorn as a part of another one: no signals, no lifespan, no word of its own in the log."""

    def __init__(self, app: _Control, path: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                uds=path,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
            )
        )

    async def serve(self, sockets: object = None) -> None:
        """Until cancelled; then whoever is connected is cut off."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup()
        try:
            await anyio.sleep_forever()
        finally:
            for server in self.servers:
                server.close()
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    def _log_started_message(self, listeners: object) -> None:
        pass
