"""A model's server as the scheduler sees it: what can be known of it, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.models.state import ModelStatus, Phase
from fluidmcp_proxy.upstream.client import Transport

__all__ = ["Server"]


class Server(Protocol):
    """A model as the scheduler sees it: launched by a supervisor, or run by somebody else."""

    @property
    def config(self) -> ModelConfig:
        """What was written about it."""

    @property
    def transport(self) -> Transport | None:
        """The way to the server while requests may go there."""

    @property
    def phase(self) -> Phase:
        """``READY`` exactly while there is a transport."""

    @property
    def status(self) -> ModelStatus:
        """A snapshot."""

    def refusal(self) -> GatewayError | None:
        """Why waiting for it is in vain, if it is."""

    def observe(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called after each change of transport, phase or refusal."""

    def request_start(self) -> None:
        """Have it started, or woken."""

    def request_stop(self) -> None:
        """Have it stopped, whatever it is doing."""

    def request_rest(self) -> None:
        """Have it put to sleep if it can sleep, else stopped."""

    def request_restart(self) -> None:
        """Have it stopped and started anew."""

    def close(self) -> None:
        """Have it stopped for good."""

    async def run(self) -> None:
        """Its loop; returns after ``close()``, when it is stopped."""
