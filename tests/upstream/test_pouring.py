"""Pieces of a body that are given away as they arrive, and what is left for whoever waits."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamTimeout
from fluidmcp_proxy.upstream.client import Response, Sink
from fluidmcp_proxy.upstream.connection import Connection

from .scripted import HOST, Peer, ask, connect, serve

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
PIECES = [b"piece %d," % number for number in range(12)]


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


async def drink(answer: Response, sink: Sink, taken: list[bytes]) -> None:
    """As the relay does: what ``sink`` does not take is taken from ``body``."""
    async for piece in answer.body:
        taken.append(piece)
        if not answer.ended:
            await answer.pour(sink)


def accepting(taken: list[bytes], wanted: Callable[[], bool] = lambda: True) -> Sink:
    def sink(piece: bytes) -> bool:
        assert piece
        if wanted():
            taken.append(piece)
            return True
        return False

    return sink


async def in_turns(peer: Peer) -> None:
    """An answer whose pieces come one by one, its end with the last one."""
    while await peer.head():
        await peer.send(HEAD)
        for piece in PIECES[:-1]:
            await peer.send(chunk(piece))
            await anyio.sleep(0.002)
        await peer.send(chunk(PIECES[-1]) + b"0\r\n\r\n")


@pytest.mark.parametrize("every", [1, 2, 3, 100])
async def test_what_is_refused_comes_in_its_place(wire: str, every: int) -> None:
    calls = 0

    def wanted() -> bool:
        nonlocal calls
        calls += 1
        return calls % every > 0 or every == 1

    async with serve(in_turns) as server, connect(server, wire) as transport:
        for _ in range(2):  # the connection may be used again
            taken: list[bytes] = []
            async with transport.exchange(b"GET", b"/", [HOST]) as answer:
                await drink(answer, accepting(taken, wanted), taken)
            assert b"".join(taken) == b"".join(PIECES)
        assert server.connections == 1
    assert bool(calls) is wire.startswith("raw")


@pytest.mark.parametrize("framing", ["chunked", "until the end"])
async def test_cut_anywhere(wire: str, framing: str) -> None:
    coded = b"".join(map(chunk, PIECES[:3])) if framing == "chunked" else b"".join(PIECES[:3])
    head = HEAD if framing == "chunked" else b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"

    async def script(peer: Peer) -> None:
        cut = int((await peer.head()).split()[1][1:])
        await peer.send(head + coded[: cut // 2])
        await anyio.sleep(0)
        await peer.send(coded[cut // 2 : cut])

    async with serve(script) as server, connect(server, wire) as transport:
        for cut in range(1, len(coded), 1 if wire.startswith("raw") else 7):
            taken: list[bytes] = []
            with pytest.raises(UpstreamDisconnected):
                async with transport.exchange(b"GET", b"/%d" % cut, [HOST]) as answer:
                    await drink(answer, accepting(taken), taken)
            assert b"".join(PIECES[:3]).startswith(b"".join(taken))


async def test_a_sink_that_fails_fails_the_exchange(wire: str) -> None:
    if not wire.startswith("raw"):
        pytest.skip("nothing is poured")
    taken: list[bytes] = []

    def sink(piece: bytes) -> bool:
        taken.append(piece)
        raise ZeroDivisionError

    async with serve(in_turns) as server, connect(server, wire) as transport:
        with pytest.raises(ZeroDivisionError):
            async with transport.exchange(b"GET", b"/", [HOST]) as answer:
                await drink(answer, sink, taken)
        assert b"".join(PIECES).startswith(b"".join(taken))  # what it has seen does not come again
        await ask(transport)
        assert server.connections == 2


async def test_a_pour_that_is_cancelled(wire: str) -> None:
    """Nothing is given away any more, and the connection is closed."""
    if not wire.startswith("raw"):
        pytest.skip("nothing is poured")
    gone, poured = anyio.Event(), anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(HEAD + chunk(b"first"))
        while not poured.is_set():
            await peer.send(chunk(b"more"))
            await anyio.sleep(0.002)
        await peer.gone()
        gone.set()

    def sink(piece: bytes) -> bool:
        assert not scope.cancel_called
        poured.set()
        return True

    async with serve(script) as server, connect(server, wire) as transport:
        with anyio.CancelScope() as scope:
            async with transport.exchange(b"GET", b"/", [HOST]) as answer, anyio.create_task_group() as tasks:
                tasks.start_soon(drink, answer, sink, [])
                await poured.wait()
                scope.cancel()
        await gone.wait()


class Clock:
    """An event loop whose time is told by the test."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def create_future(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        timer = (self.now + seconds, callback)
        self.timers.append(timer)

        class Handle:
            def cancel(_) -> None:  # noqa: N805
                self.timers.remove(timer)

        return Handle()

    def run_until(self, then: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= then]:
            timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = timer[0]
            timer[1]()
        self.now = then


class Wire:
    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.aborted = self.paused = False

    def get_extra_info(self, name: str) -> Any:
        return self.end

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.paused = True


@pytest.fixture
def end() -> Iterator[socket.socket]:
    one, other = socket.socketpair()
    with one, other:
        yield one


def begin(end: socket.socket) -> tuple[Any, Connection, Wire]:
    clock: Any = Clock()
    connection, below = Connection(clock, lambda gone: None), Wire(end)
    connection.connection_made(below)  # type: ignore[arg-type]
    connection.begin(head_only=False, uploading=False)
    connection.data_received(HEAD)
    return clock, connection, below


async def test_a_silence_is_limited_and_not_the_stream(wire: str, end: socket.socket) -> None:
    if wire != "raw":
        pytest.skip("a test of the connection alone")
    clock, connection, below = begin(end)
    taken: list[bytes] = []
    async with anyio.create_task_group() as tasks:
        connection.arm(10)
        tasks.start_soon(connection.pour, accepting(taken))
        await anyio.sleep(0)
        for _ in range(20):
            clock.run_until(clock.now + 7)
            connection.data_received(chunk(b"x"))
        assert len(clock.timers) == 1
        clock.run_until(clock.now + 9.9)
        assert connection.error is None
        clock.run_until(clock.now + 0.2)
    assert isinstance(connection.error, UpstreamTimeout)
    assert below.aborted
    assert taken == [b"x"] * 20


async def test_after_a_refusal_nothing_overtakes(wire: str, end: socket.socket) -> None:
    """The one who waits may be slow to come; what arrives meanwhile stays behind what was refused."""
    if wire != "raw":
        pytest.skip("a test of the connection alone")
    _, connection, below = begin(end)
    calls: list[bytes] = []

    def refusing(piece: bytes) -> bool:
        calls.append(piece)
        return False

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.pour, refusing)
        await anyio.sleep(0)
        connection.data_received(chunk(b"one"))
        connection.data_received(chunk(b"two"))
        assert calls == [b"one"]
        connection.data_received(chunk(b"x" * 65536))
        assert below.paused
    assert connection.answer.parts[:2] == [b"one", b"two"]
