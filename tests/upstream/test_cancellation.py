"""Cancel at every await: the server sees the connection close, nothing leaks, and the next request is served."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fluidmcp_proxy.upstream.client import Address, Timeouts, Transport

from .scripted import HOST, OK, Peer, ask, connect, serve

pytestmark = pytest.mark.anyio

STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n"


async def script(peer: Peer) -> None:
    """``/slow`` streams three chunks with a turn of the loop in between; ``/hang`` says nothing."""
    while head := await peer.head():
        if b"/hang" in head:
            await peer.gone()
            return
        if b"/slow" in head:
            await peer.send(STREAM)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
                await peer.send(b"2\r\ncd\r\n")
            await peer.send(b"0\r\n\r\n")
        else:
            if b"POST" in head:
                await peer.until(b"0\r\n\r\n")
            await peer.send(OK)


async def upload() -> AsyncIterator[bytes]:
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
        yield b"x"


WAYS: dict[str, tuple[bytes, bytes, Callable[[], Any]]] = {
    "plain": (b"GET", b"/", lambda: None),
    "streamed answer": (b"GET", b"/slow", lambda: None),
    "streamed request": (b"POST", b"/", upload),
}


@pytest.mark.parametrize("way", WAYS)
async def test_cancelled_after_any_number_of_turns(wire: str, way: str) -> None:
    """Cancels the exchange after 0, 1, 2 … turns of the event loop, until one is complete."""
    method, target, body = WAYS[way]

    async with serve(script) as server, connect(server, wire) as transport:
        complete, turns = False, 0
        while not complete:
            complete = await _cancelled_after(turns, transport, method, target, body())
            assert (await ask(transport)).body == b"ok"
            turns += 1
        assert turns > 3, "it was never cancelled inside"


async def _cancelled_after(turns: int, transport: Transport, method: bytes, target: bytes, body: Any) -> bool:
    complete = False

    async def one() -> None:
        nonlocal complete
        answer = await ask(transport, method, target, body=body)
        assert answer.body in (b"ok", b"abcdcdcd")
        complete = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one)
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
            if complete:
                break
        tasks.cancel_scope.cancel()
    return complete


@pytest.mark.parametrize("when", ["waiting for the head", "inside the body", "reading nothing"])
async def test_the_server_sees_it_at_once(wire: str, when: str) -> None:
    gone, started = anyio.Event(), anyio.Event()

    async def watched(peer: Peer) -> None:
        await peer.head()
        if when != "waiting for the head":
            await peer.send(STREAM)
        else:
            started.set()
        await peer.gone()
        gone.set()

    async with serve(watched) as server, connect(server, wire) as transport:

        async def one() -> None:
            async with transport.exchange(b"GET", b"/", [HOST]) as answer:
                if when == "reading nothing":
                    started.set()
                    await anyio.sleep_forever()
                async for _ in answer.body:
                    started.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await started.wait()
            tasks.cancel_scope.cancel()
        await gone.wait()


async def test_cancelled_while_connecting(wire: str) -> None:
    """A port that does not answer, and a deadline that is not the transport's own."""
    with deaf_port() as port:
        async with connect(Address("http", "127.0.0.1", port), wire, Timeouts(connect=60)) as transport:
            with anyio.move_on_after(0.1) as scope:
                await ask(transport)
            assert scope.cancelled_caught


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port whose backlog is full: the kernel drops every further SYN."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_many_cancelled_together_leave_the_transport_usable(wire: str) -> None:
    async with serve(script) as server, connect(server, wire) as transport:
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(ask, transport, b"GET", b"/hang")
            while server.connections < 50:
                await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
        assert (await ask(transport)).body == b"ok"


async def test_exception_inside_the_block_closes(wire: str) -> None:
    gone = anyio.Event()

    async def watched(peer: Peer) -> None:
        await peer.head()
        await peer.send(STREAM)
        await peer.gone()
        gone.set()

    async with serve(watched) as server, connect(server, wire) as transport:
        with pytest.raises(ZeroDivisionError):
            async with transport.exchange(b"GET", b"/", [HOST]):
                raise ZeroDivisionError
        await gone.wait()
