"""Is a server that has requests inside still working on them? vLLM's ``/health`` says 200 while its engine hangs.

Signs of life are bytes of any answer, a request that ends, and ``vllm:iteration_tokens_total`` on ``/metrics``, which
moves with every step of the engine, prefill included. Time counts only while a request is inside. A server that answers
``/metrics`` without that figure tells nothing, and what tells nothing is never a reason to restart; one that does not
answer at all is as silent as its engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import anyio

from fluidmcp_proxy.errors import UpstreamError
from fluidmcp_proxy.upstream.client import Address, Transport

__all__ = ["engine_steps", "until_stalled"]

_LONGEST_PERIOD = 5.0
_MAX_METRICS_BYTES = 4 * 1024 * 1024
# A histogram of tokens per step: its sum and count both grow with each step, one series for each engine.
_STEPS = re.compile(rb"^vllm:iteration_tokens_total_(?:sum|count)(?:\{[^}\n]*\})? ([0-9.eE+]+)", re.MULTILINE)


async def until_stalled(
    transport: Transport,
    address: Address,
    *,
    in_flight: Callable[[], int],
    progress: Callable[[], int],
    stall_timeout: float,
) -> None:
    """Return once requests have been inside for ``stall_timeout`` seconds without any sign of life.

    ``progress`` is a number that grows with every byte answered and every request ended.
    """
    period = min(_LONGEST_PERIOD, stall_timeout / 5)
    seen: tuple[int, float | None] | None = None
    silent_since = anyio.current_time()
    while True:
        await anyio.sleep(period)
        if not in_flight():
            seen = None
            continue
        steps = await engine_steps(transport, address, patience=period)
        sign = (progress(), steps)
        if seen is None or sign != seen or steps == _UNTOLD:
            seen, silent_since = sign, anyio.current_time()
        elif anyio.current_time() - silent_since >= stall_timeout:
            return


_UNTOLD = -1.0
"""The server answers, but not this question."""


async def engine_steps(transport: Transport, address: Address, *, patience: float) -> float | None:
    """A number that grows with every step of the engine; None without an answer, ``_UNTOLD`` without that figure."""
    body = bytearray()
    try:
        with anyio.move_on_after(patience):
            target = f"{address.root}/metrics".encode()
            async with transport.exchange(b"GET", target, [(b"host", address.authority)]) as response:
                async for chunk in response.body:
                    body += chunk
                    if len(body) > _MAX_METRICS_BYTES:
                        return _UNTOLD
                found = _STEPS.findall(body)
                return sum(map(float, found)) if found else _UNTOLD
    except UpstreamError:
        pass
    return None
