"""When is a server ready? Polled from outside, since no server says so by itself.

``/health`` of vLLM is open only once the model is loaded. Nothing is sent to an address before the listener there is
known to be the model's own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from fluidmcp_proxy.errors import UpstreamError
from fluidmcp_proxy.upstream.client import Address, Transport

__all__ = ["PROBE_TIMEOUT", "is_serving", "probe", "until_ready"]

PROBE_TIMEOUT = 60.0
"""Seconds for one probe: vLLM's ``/health`` can take 40 s while it compiles or is under load."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5


async def until_ready(
    listening: Callable[[], Awaitable[Address | None]], connect: Callable[[Address], Transport], path: str
) -> Transport:
    """Wait until the server listens and answers ``GET path`` with 200, and return the transport to it.

    Without a time limit of its own. What ``listening`` raises goes through.
    """
    pause = _FIRST_PAUSE
    while (address := await listening()) is None:
        await anyio.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 1.3)
    transport = connect(address)
    try:
        while await probe(transport, address, path) != 200:
            await anyio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.3)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await transport.aclose()
        raise
    return transport


async def probe(transport: Transport, address: Address, path: str) -> int | None:
    """The status of ``GET path`` on the server's root, or None when there is no answer."""
    target = (address.root + path).encode()
    try:
        with anyio.move_on_after(PROBE_TIMEOUT):
            async with transport.exchange(b"GET", target, [(b"host", address.authority)]) as response:
                async for _ in response.body:
                    pass
                return response.status
    except UpstreamError:
        pass
    return None


def is_serving(status: int | None) -> bool:
    """Whether a server that somebody else runs is there: any answer below 500 but 404.

    401 counts, since such a server may want a key that only the clients have.
    """
    return status is not None and status < 500 and status != 404
