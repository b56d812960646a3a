"""A model whose server somebody else runs: probed, never started or stopped.

Requests are forwarded whatever the probe says, since it may be older than the server; its result is for ``/ready``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import GatewayError, ModelStopped, ShuttingDown
from fluidmcp_proxy.models.readiness import is_serving, probe
from fluidmcp_proxy.models.state import ModelState, ModelStatus, Phase
from fluidmcp_proxy.upstream.client import Address, Transport

__all__ = ["RemoteServer"]

logger = logging.getLogger("fluidmcp_proxy.models")

_PERIOD_WHILE_READY, _PERIOD_WHILE_GONE = 10.0, 1.0


class RemoteServer:
    """The server of one model without ``command``."""

    def __init__(
        self, config: ModelConfig, address: Address, transport: Transport, *, drain: Callable[[], Awaitable[None]]
    ) -> None:
        self.config = config
        self._address = address
        self._drain = drain
        self._closing = anyio.Event()
        self._changed: Callable[[], None] = lambda: None
        self.transport: Transport | None = transport
        self._status = ModelStatus(id=config.id, state=ModelState.STARTING, since=time.time())

    def __repr__(self) -> str:
        return f"<RemoteServer {self.config.id!r} {self._status.state}>"

    @property
    def status(self) -> ModelStatus:
        """What the last probe saw: ``ready``, or ``starting`` while the server does not answer."""
        return self._status

    @property
    def phase(self) -> Phase:
        """``READY`` until ``close()``: whether the server is there shows when it is used."""
        return Phase.GOING if self.transport is None else Phase.READY

    def refusal(self) -> GatewayError | None:
        """``ShuttingDown`` after ``close()``."""
        return ShuttingDown("The gateway is shutting down.", retry_after=5) if self.transport is None else None

    def observe(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called when this closes."""
        self._changed = changed

    def request_start(self) -> None:
        """Nothing to start: raises ``ModelStopped`` with the reason."""
        raise ModelStopped(f"The server of LLM model '{self.config.id}' is not run by this gateway.")

    request_stop = request_rest = request_restart = request_start

    def close(self) -> None:
        """No more requests; ``run()`` returns when those inside are done."""
        self.transport = None
        self._closing.set()
        self._changed()

    async def run(self) -> None:
        """Probe until ``close()``, then drain and close the connections."""
        transport = self.transport
        if transport is None:
            return
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._probe_forever, transport)
                await self._closing.wait()
                await self._drain()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await transport.aclose()

    async def _probe_forever(self, transport: Transport) -> None:
        while True:
            self._see(is_serving(await probe(transport, self._address, self.config.readiness_path)))
            ready = self._status.state is ModelState.READY
            await anyio.sleep(_PERIOD_WHILE_READY if ready else _PERIOD_WHILE_GONE)

    def _see(self, serving: bool) -> None:
        state = ModelState.READY if serving else ModelState.STARTING
        message = None if serving else f"The server of LLM model '{self.config.id}' does not answer."
        if state is not self._status.state:
            logger.info("model %s: %s", self.config.id, "ready" if serving else "does not answer")
            self._status = replace(self._status, since=time.time(), state=state)
        self._status = replace(self._status, message=message)
