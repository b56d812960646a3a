"""vLLM's sleep mode: its GPU memory is given back while its processes, compiled code and, at level 1, weights stay.

The routes are there with ``--enable-sleep-mode`` and ``VLLM_SERVER_DEV_MODE=1``. ``/health`` says 200 while it sleeps,
so whether it sleeps is taken from ``/is_sleeping`` only (https://docs.vllm.ai/en/latest/features/sleep_mode/).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Protocol

import anyio

from fluidmcp_proxy.errors import UpstreamError
from fluidmcp_proxy.upstream.client import Address, Transport

__all__ = ["SleepMode", "Sleeper"]

logger = logging.getLogger("fluidmcp_proxy.models")

_LIMIT = 120.0
"""Seconds for falling asleep, and for waking up; at level 2 waking reads the weights again."""

_RELOAD = json.dumps({"method": "reload_weights"}).encode()
# Level 2 has lost the weights: memory for them, the weights, memory for the cache, in this order so that it fits.
_WAKE_UP = {
    1: (("/wake_up", b""),),
    2: (
        ("/wake_up?tags=weights", b""),
        ("/collective_rpc", _RELOAD),
        ("/wake_up?tags=kv_cache", b""),
        ("/reset_prefix_cache", b""),
    ),
}


class Sleeper(Protocol):
    """Puts a ready server to sleep instead of ending it."""

    async def fall_asleep(self, transport: Transport) -> bool:
        """Whether it sleeps now, verified."""

    async def wake_up(self, transport: Transport) -> bool:
        """Whether it is awake now, verified."""


@dataclass(frozen=True, slots=True)
class SleepMode:
    """Puts the server at ``address`` to sleep at ``level`` 1 or 2, and wakes it."""

    address: Address
    level: int
    limit: float = _LIMIT

    async def fall_asleep(self, transport: Transport) -> bool:
        """Whether it sleeps now, as it says itself."""
        return await self._bring_about(transport, ((f"/sleep?level={self.level}", b""),), sleeping=True)

    async def wake_up(self, transport: Transport) -> bool:
        """Whether it is awake now, with its weights, as it says itself."""
        return await self._bring_about(transport, _WAKE_UP[self.level], sleeping=False)

    async def _bring_about(self, transport: Transport, steps: tuple[tuple[str, bytes], ...], *, sleeping: bool) -> bool:
        try:
            with anyio.move_on_after(self.limit):
                for path, body in steps:
                    status, _ = await self._exchange(transport, b"POST", path, body)
                    if status != 200:
                        logger.warning("%s answered %d to %s", self.address.url, status, path)
                        return False
                return await self._says(transport, sleeping)
        except UpstreamError as error:
            logger.warning("%s: %s", self.address.url, error.message)
        return False

    async def _says(self, transport: Transport, sleeping: bool) -> bool:
        status, body = await self._exchange(transport, b"GET", "/is_sleeping", b"")
        try:
            return status == 200 and json.loads(body) == {"is_sleeping": sleeping}
        except ValueError:
            return False

    async def _exchange(self, transport: Transport, method: bytes, path: str, body: bytes) -> tuple[int, bytes]:
        target = (self.address.root + path).encode()
        headers = [(b"host", self.address.authority)]
        if body:
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        async with transport.exchange(method, target, headers, body or None) as response:
            received = bytearray()
            async for chunk in response.body:
                received += chunk
            return response.status, bytes(received)
