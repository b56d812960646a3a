"""When a connection is used again and when it is not: no answer is ever taken for another request's."""

from __future__ import annotations

import anyio
import pytest

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamError, UpstreamInvalidResponse, UpstreamUnavailable
from fluidmcp_proxy.upstream.client import Timeouts, Transport
from fluidmcp_proxy.upstream.connection import Connection
from fluidmcp_proxy.upstream.transport import AsyncioTransport
from fluidmcp_proxy.upstream.websocket import WebSocket

from .scripted import HOST, OK, Peer, ask, connect, serve

pytestmark = pytest.mark.anyio

RAW = pytest.mark.parametrize("wire", ["raw", "raw-uvloop"], indirect=True)

FALSE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nFALSE"


async def numbered(peer: Peer) -> None:
    """Answer each request with its own target."""
    while head := await peer.head():
        target = head.split()[1]
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(target), target))


SURPLUS = {
    "a whole answer": FALSE,
    "the beginning of an answer": b"HTTP/1.1 2",
    "garbage": b"\x00\x01\x02",
    "one byte": b"x",
    "a late interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@RAW
@pytest.mark.parametrize("case", SURPLUS)
@pytest.mark.parametrize("apart", [False, True], ids=["in one piece", "apart"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_surplus_is_never_the_next_answer(wire: str, case: str, apart: bool, framing: str) -> None:
    sent = anyio.Event()

    async def script(peer: Peer) -> None:
        while head := await peer.head():
            target = head.split()[1]
            if framing == "length":
                answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(target), target)
            else:
                answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
                    len(target),
                    target,
                )
            if apart:
                await peer.send(answer)
                await peer.send(SURPLUS[case])
            else:
                await peer.send(answer + SURPLUS[case])
            sent.set()

    async with serve(script) as server, connect(server, wire) as transport:
        assert (await ask(transport, target=b"/first")).body == b"/first"
        await sent.wait()  # or it could rightly come too late to be noticed
        assert (await ask(transport, target=b"/second")).body == b"/second"
        assert server.connections == 2


async def test_many_at_once_get_their_own(wire: str) -> None:
    async with serve(numbered) as server, connect(server, wire) as transport:

        async def one(number: int) -> None:
            for turn in range(3):
                target = b"/%d/%d" % (number, turn)
                assert (await ask(transport, target=target)).body == target

        async with anyio.create_task_group() as tasks:
            for number in range(30):
                tasks.start_soon(one, number)


async def test_left_early_closes_and_is_not_used_again(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        if b" /stream " in await peer.head():
            await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
            await peer.gone()
            gone.set()
        else:
            await peer.send(OK)

    async with serve(script) as server, connect(server, wire) as transport:
        async with transport.exchange(b"GET", b"/stream", [HOST]) as answer:
            assert await answer.body.__anext__() == b"abc"
        await gone.wait()
        assert (await ask(transport)).body == b"ok"
        assert server.connections == 2


async def test_body_cannot_be_read_after_leaving(wire: str) -> None:
    async with serve(numbered) as server, connect(server, wire) as transport:
        async with transport.exchange(b"GET", b"/a", [HOST]) as answer:
            pass
        try:
            rest = [chunk async for chunk in answer.body]
        except UpstreamError:
            rest = []
        assert rest == []
        assert (await ask(transport, target=b"/b")).body == b"/b"


async def test_server_that_closes_idle_connections_costs_no_request(wire: str) -> None:
    """The end of file is seen before the next request is sent, also when the loop had no turn in between."""
    closed = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        await peer.stream.aclose()
        closed.set()

    async with serve(script) as server, connect(server, wire) as transport:
        for number in range(1, 6):
            assert (await ask(transport)).body == b"ok"
            await closed.wait()
            assert server.connections == number


async def test_idle_for_too_long_is_not_used_again(wire: str) -> None:
    async with serve(numbered) as server:
        async with connect(server, wire, keep_alive=60) as transport:
            for _ in range(2):
                await ask(transport)
            assert server.connections == 1
        async with connect(server, wire, keep_alive=0.01) as transport:
            for number in (2, 3):
                await ask(transport)
                await anyio.sleep(0.02)
                assert server.connections == number


@RAW
async def test_idle_connections_are_closed_without_another_request(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        await peer.gone()
        gone.set()

    async with serve(script) as server, connect(server, wire, keep_alive=0.03) as transport:
        await ask(transport)
        await gone.wait()


@RAW
@pytest.mark.parametrize(("said", "connections"), [(b"timeout=1", 2), (b"timeout=60, max=100", 1), (b"nonsense", 1)])
async def test_what_the_server_says_about_keeping(wire: str, said: bytes, connections: int) -> None:
    async def script(peer: Peer) -> None:
        while await peer.head():
            await peer.send(b"HTTP/1.1 200 OK\r\nkeep-alive: %b\r\ncontent-length: 2\r\n\r\nok" % said)

    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport)
        await ask(transport)
        assert server.connections == connections


@RAW
async def test_the_connection_used_last_is_used_next(wire: str) -> None:
    order: list[int] = []

    async def script(peer: Peer) -> None:
        while await peer.head():
            order.append(peer.number)
            await peer.send(OK)

    async with serve(script) as server, connect(server, wire) as transport:
        async with transport.exchange(b"GET", b"/", [HOST]) as first:
            async with transport.exchange(b"GET", b"/", [HOST]) as second:
                assert [chunk async for chunk in second.body] == [b"ok"]
            assert [chunk async for chunk in first.body] == [b"ok"]
        for _ in range(3):
            await ask(transport)
        assert order == [1, 2, 1, 1, 1]
        assert repr(transport) == f"<AsyncioTransport {server.address.url}, 2 connections, 2 of them idle>"


async def test_a_request_that_kills_the_server_is_sent_once(wire: str) -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        while head := await peer.head():
            heads.append(head.split()[1])
            if heads[-1] == b"/deadly":
                return
            await peer.send(OK)

    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport)
        with pytest.raises(UpstreamDisconnected):
            await ask(transport, target=b"/deadly")
    assert heads == [b"/", b"/deadly"]


async def test_a_bad_answer_costs_no_other_request(wire: str) -> None:
    async def script(peer: Peer) -> None:
        while head := await peer.head():
            await peer.send(b"nonsense\r\n\r\n" if b"/bad" in head else OK)

    async with serve(script) as server, connect(server, wire) as transport:
        for _ in range(3):
            assert (await ask(transport)).body == b"ok"
            with pytest.raises(UpstreamInvalidResponse):
                await ask(transport, target=b"/bad")


async def test_server_that_hangs_up_at_once(wire: str) -> None:
    async def script(peer: Peer) -> None:
        pass

    async with serve(script) as server, connect(server, wire) as transport:
        for _ in range(10):
            with pytest.raises((UpstreamUnavailable, UpstreamDisconnected)):
                await ask(transport)


@RAW
async def test_hung_up_before_anything_was_sent_is_a_failed_connect(wire: str) -> None:
    class Late(AsyncioTransport):
        async def _dial(self, connection: Connection | WebSocket) -> None:
            await super()._dial(connection)
            while connection.is_open():
                await anyio.sleep(0)
            await anyio.sleep(0.01)

    async def script(peer: Peer) -> None:
        pass

    async with serve(script) as server:
        transport = Late(server.address, Timeouts())
        with pytest.raises(UpstreamUnavailable):
            await ask(transport)
        assert repr(transport).endswith("0 connections, 0 of them idle>")
        await transport.aclose()


@RAW
async def test_closing_ends_what_is_under_way(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.gone()

    async with serve(script) as server, connect(server, wire) as transport:
        ended: list[type[BaseException]] = []

        async def one() -> None:
            try:
                await ask(transport)
            except UpstreamError as error:
                ended.append(type(error))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)
            while server.connections < 2:
                await anyio.sleep(0.01)
            await transport.aclose()
        assert ended == [UpstreamDisconnected] * 2
        with pytest.raises(UpstreamUnavailable):
            await ask(transport)


@RAW
@pytest.mark.parametrize("websocket", [False, True])
async def test_closing_ends_what_is_being_connected(wire: str, websocket: bool) -> None:
    """The server would keep the connection, and its request, for ever."""
    dialled, proceed, gone = anyio.Event(), anyio.Event(), anyio.Event()

    class Late(AsyncioTransport):
        async def _dial(self, connection: Connection | WebSocket) -> None:
            await super()._dial(connection)
            dialled.set()
            await proceed.wait()

    async def script(peer: Peer) -> None:
        assert await peer.head() == b""
        gone.set()

    async with serve(script) as server, anyio.create_task_group() as tasks:
        transport = Late(server.address, Timeouts())

        async def one() -> None:
            request = transport.exchange(b"GET", b"/", [HOST])
            with pytest.raises(UpstreamUnavailable):
                async with transport.open_websocket(b"/", [HOST], max_message=1) if websocket else request:
                    pass

        tasks.start_soon(one)
        await dialled.wait()
        await transport.aclose()
        proceed.set()
        await gone.wait()
    assert repr(transport).endswith("0 connections, 0 of them idle>")


async def test_closing_an_unused_transport(wire: str) -> None:
    async with serve(numbered) as server, connect(server, wire):
        assert server.connections == 0


@RAW
async def test_the_counters(wire: str) -> None:
    async with serve(numbered) as server, connect(server, wire) as transport:
        for _ in range(4):
            await ask(transport)
        raw = _raw(transport)
        assert (raw.opened, raw.reused) == (1, 3)


def _raw(transport: Transport) -> AsyncioTransport:
    raw = getattr(transport, "_chosen", transport)
    assert isinstance(raw, AsyncioTransport)
    return raw
