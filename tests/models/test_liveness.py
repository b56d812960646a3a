"""Stalls: what counts as a sign of life, and what does not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import UpstreamDisconnected
from fluidmcp_proxy.models.liveness import until_stalled
from fluidmcp_proxy.upstream.client import Body, Headers, Response
from tests.models.doubles import ADDRESS, FakeResponse, FakeTransport, Rig, running
from tests.models.virtual_time import BACKEND

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


STALL = 0.05


def metrics(steps: float) -> bytes:
    return (
        f"# HELP vllm:iteration_tokens_total Histogram of number of tokens per engine_step.\n"
        f'vllm:iteration_tokens_total_bucket{{engine="0",le="1.0"}} 9.0\n'
        f'vllm:iteration_tokens_total_sum{{engine="0",model_name="m"}} {steps}\n'
        f'vllm:iteration_tokens_total_count{{engine="0",model_name="m"}} 3.0\n'
    ).encode()


class Metrics(FakeTransport):
    """A server whose ``/metrics`` are what ``read`` returns; it may raise, or hang on None."""

    def __init__(self, read: Callable[[], bytes | None]) -> None:
        super().__init__()
        self.read = read
        self.reads = 0

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        self.reads += 1
        data = self.read()
        if data is None:
            await anyio.sleep_forever()
        yield FakeResponse(200, data or b"")


async def watch(
    transport: Metrics, *, in_flight: int = 1, progress: Callable[[], int] = lambda: 0, limit: float = 10.0
) -> bool:
    """Whether a stall is found within ``limit`` seconds."""
    stalled = partial(until_stalled, in_flight=lambda: in_flight, progress=progress, stall_timeout=STALL)
    with anyio.move_on_after(limit):
        await stalled(transport, ADDRESS)
        return True
    return False


lives = partial(watch, limit=STALL * 6)


async def test_neither_bytes_nor_steps_is_a_stall() -> None:
    assert await watch(Metrics(lambda: metrics(7)))


async def test_an_idle_server_is_none() -> None:
    transport = Metrics(lambda: metrics(7))
    assert not await lives(transport, in_flight=0)
    assert transport.reads == 0


async def test_bytes_are_a_sign_of_life() -> None:
    counter = iter(range(1_000_000))
    assert not await lives(Metrics(lambda: metrics(7)), progress=lambda: next(counter))


async def test_steps_of_the_engine_are_a_sign_of_life() -> None:
    """A slow prefill sends no byte for minutes."""
    counter = iter(range(1_000_000))
    assert not await lives(Metrics(lambda: metrics(next(counter))))


@pytest.mark.parametrize("body", [b"", b"llamacpp:tokens_total 1\n", b"x" * 5_000_000])
async def test_a_server_without_that_figure_is_left_alone(body: bytes) -> None:
    assert not await lives(Metrics(lambda: body))


async def test_no_answer_at_all_is_silence() -> None:
    def refuse() -> bytes:
        raise UpstreamDisconnected("gone")

    assert await watch(Metrics(refuse))
    assert await watch(Metrics(lambda: None))


async def test_a_stalled_model_is_restarted() -> None:
    stalled = anyio.Event()
    calls = 0

    async def until(transport: object) -> None:
        nonlocal calls
        calls += 1
        await (stalled.wait() if calls == 1 else anyio.sleep_forever())

    async with running(Rig(until_stalled=until)) as rig:
        rig.supervisor.request_start()
        await rig.until("ready")
        stalled.set()
        await rig.until_launched(2)
        await rig.until("ready")
        assert calls == 2
