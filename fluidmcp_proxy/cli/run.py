"""``fluidmcp run``: the gateway under uvicorn, with the models' progress on the terminal."""

from __future__ import annotations

import gc
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import anyio
import anyio.abc
import click
import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from fluidmcp_proxy.cli.control import serve_control
from fluidmcp_proxy.cli.faults import BadConfiguration
from fluidmcp_proxy.cli.logs import Terminal, configure_logging
from fluidmcp_proxy.cli.memory import keep_freed_memory
from fluidmcp_proxy.cli.progress import report_progress, url_of
from fluidmcp_proxy.cli.protocol import GatewayProtocol
from fluidmcp_proxy.cli.reload import Reload, heed_hangups, reloading
from fluidmcp_proxy.cli.terminal import Board
from fluidmcp_proxy.config.checks import check_exposure
from fluidmcp_proxy.config.load import load_config
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.config.settings import LogLevel, Settings
from fluidmcp_proxy.config.sources import is_loopback
from fluidmcp_proxy.errors import ConfigError, ungrouped
from fluidmcp_proxy.gateway.access import ServedBy
from fluidmcp_proxy.gateway.app import Gateway

__all__ = ["COULD_NOT_START", "run"]

COULD_NOT_START = 3
"""Exit code: the configuration is good, but the port is taken, or another gateway runs it."""

_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
_OPEN = "whoever reaches it may use the models"
# Longer than the clients' pools keep an idle connection, so that they close it and not we (the keep-alive race).
_KEEP_ALIVE = 75
# Seconds. A client cannot be heard while the model's server does not read what it has sent, so patience is long.
_WS_PING_INTERVAL, _WS_PING_TIMEOUT = 20, 300
# What the gateway needs after the drain to end the streams that it cuts.
_CUT_GRACE = 10


@click.command()
@click.argument("config", type=click.Path())
@click.option("--file", is_flag=True, help="Accepted for FluidMCP's sake: CONFIG is always a file.")
@click.option("--start-server", is_flag=True, help="Accepted for FluidMCP's sake: the server is always started.")
@click.option("--host", help="Address to bind. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to bind, 0 for any free one. [default: 8099]")
@click.option(
    "--allow-open", is_flag=True, default=None, help="Bind an address that others can reach although there are no keys."
)
@click.option("--log-level", type=click.Choice(_LOG_LEVELS, case_sensitive=False), help="[default: info]")
def run(
    config: str,
    file: bool,
    start_server: bool,
    host: str | None,
    port: int | None,
    allow_open: bool | None,
    log_level: LogLevel | None,
) -> None:
    """Start the models of CONFIG and serve their API until Ctrl-C or SIGTERM.

    Every model is at http://HOST:PORT/MODEL/v1 from the first second; requests wait while it loads.

    Exit code 2: the configuration cannot be used, or the address can be reached from elsewhere and there are no keys;
    3: the port is taken, or another gateway runs this configuration.
    """
    read = partial(load_config, config, host=host, port=port, allow_open=allow_open, log_level=log_level)
    try:
        loaded = read()
        check_exposure(loaded.settings)
    except ConfigError as error:
        raise BadConfiguration(error) from None
    terminal = configure_logging(loaded.settings.log_level, loaded.settings.log_format)
    if not is_loopback(loaded.settings.host) and not loaded.settings.api_keys:
        click.echo(f"warning: {loaded.settings.host} is open to the network, and there are no keys: {_OPEN}", err=True)
    sys.exit(serve(loaded, read, terminal))


def serve(config: GatewayConfig, read: Callable[[], GatewayConfig], terminal: Terminal) -> int:
    """Run the gateway until a signal ends it, and return the exit code. ``read`` is for its configuration later on.

    A signal that ended it is raised again at the end, so that a shell shows 143 or 130.
    """
    listening = bind(config.settings)
    with listening:
        gateway = Gateway(config, served_by=ServedBy.COMMAND_LINE, report=terminal.report)
        server = _Server(gateway, reloading(gateway, read), listening, terminal)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # before the server has taken the signals
            server.ended_by = signal.SIGINT
    terminal.flush()  # a signal leaves no time for it
    if server.ended_by is not None:
        signal.signal(server.ended_by, signal.SIG_DFL)
        signal.raise_signal(server.ended_by)
    return 0 if server.started else COULD_NOT_START


def bind(settings: Settings) -> socket.socket:
    """The listening socket, before any model is started for nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named: asyncio sets TCP_NODELAY on no other, and Nagle costs 40 ms a request.
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        click.echo(
            f"Error: cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port",
            err=True,
        )
        sys.exit(COULD_NOT_START)
    listening.set_inheritable(False)
    return listening


class _Server(uvicorn.Server):
    """uvicorn, telling the gateway when it begins to end, and reporting what the models do."""

    def __init__(self, gateway: Gateway, reload: Reload, listening: socket.socket, terminal: Terminal) -> None:
        settings = gateway.config.settings
        self._gateway = gateway
        self._reload = reload
        self._terminal = terminal
        self._listening = listening
        self._tasks: anyio.abc.TaskGroup | None = None
        self.ended_by: int | None = None
        super().__init__(
            uvicorn.Config(
                gateway,
                http=GatewayProtocol,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,  # the model's server says both
                date_header=False,
                proxy_headers=False,
                ws="websockets-sansio",
                ws_max_size=settings.max_body_bytes,
                ws_ping_interval=_WS_PING_INTERVAL,
                ws_ping_timeout=_WS_PING_TIMEOUT,
                ws_per_message_deflate=False,  # audio does not shrink, and all clients share one core
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout) + _CUT_GRACE,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """For good: once uvicorn had given them back, another Ctrl-C would end this program in the midst of its end."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; the signal is raised again when all is done, and not, as uvicorn would, in the event loop."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True
        self.ended_by = sig

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        with ungrouped():  # a start-up that fails comes as SystemExit
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                board = self._terminal.board = Board(sys.stdout) if sys.stdout.isatty() else None
                tasks.start_soon(report_progress, self._gateway, self._url, board)
                tasks.start_soon(self._terminal.flush_forever)
                await super().serve(sockets)
                tasks.cancel_scope.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the way for the command line, too, once this gateway is known to be the only one."""
        await super().startup(sockets)
        keep_freed_memory()
        gc.freeze()  # what is there by now stays: not to be looked through again with every full collection
        if self._tasks is not None:
            self._tasks.start_soon(serve_control, self._gateway, self._url, self._reload)
            self._tasks.start_soon(heed_hangups, self._reload, self._hang_up)

    def _hang_up(self, number: int) -> None:
        self.handle_exit(number, None)

    @property
    def _url(self) -> str:
        return url_of(*self._listening.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop taking requests in the gateway and here together; uvicorn would tell it after the last one only."""
        self._gateway.begin_shutdown()
        await super().shutdown(sockets)
        if self.force_exit:  # Ctrl-C twice: uvicorn would go at once, but the models have to be ended
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await self.lifespan.shutdown()
