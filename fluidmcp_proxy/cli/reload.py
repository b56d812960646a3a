"""A running gateway reads its file again: asked for by ``fluidmcp reload``, or by SIGHUP where there is no terminal.

A daemon is told by SIGHUP to read its configuration again; to a program with a terminal it says that this was closed.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import anyio

from fluidmcp_proxy.config.checks import check_exposure
from fluidmcp_proxy.config.difference import Difference, in_force
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.errors import FluidMCPError
from fluidmcp_proxy.gateway.app import Gateway

__all__ = ["Reload", "heed_hangups", "reloading"]

logger = logging.getLogger("fluidmcp_proxy.cli")

Reload = Callable[[], Difference]


def reloading(gateway: Gateway, read: Callable[[], GatewayConfig]) -> Reload:
    """What has ``gateway`` run what ``read`` returns.

    It raises ``ConfigError`` when that cannot be used, and what ``Gateway.reload`` raises; then nothing has changed.
    """

    def reload() -> Difference:
        config = read()
        check_exposure(in_force(gateway.config.settings, config.settings))
        return gateway.reload(config)

    return reload


async def heed_hangups(reload: Reload, end: Callable[[int], None]) -> None:
    """With each SIGHUP reload, or ``end`` where there is a terminal, until cancelled. One ignored so far stays so."""
    has_terminal = _has_terminal()
    if has_terminal and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        return
    with anyio.open_signal_receiver(signal.SIGHUP) as hangups:
        async for number in hangups:
            if has_terminal:
                end(number)
                continue
            try:
                reload()
            except FluidMCPError as error:
                logger.error("the configuration stays as it was: %s", error)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
