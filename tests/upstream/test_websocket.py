"""WebSockets to a model's server: messages, ends, nonsense, flow control and cancellation, at the level of the wire."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, unix_serve

from fluidmcp_proxy.errors import (
    InvalidTarget,
    UpstreamDisconnected,
    UpstreamInvalidResponse,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from fluidmcp_proxy.upstream import websocket
from fluidmcp_proxy.upstream.client import Address, Timeouts, Transport
from fluidmcp_proxy.upstream.endings import HandshakeRefused, WebSocketClosed, can_be_sent
from fluidmcp_proxy.upstream.websocket import WebSocket
from tests.serving import DEADLINE, free_port

from .scripted import HOST, Peer, Server, authority, connect, serve

pytestmark = pytest.mark.anyio

RAW = pytest.mark.parametrize("wire", ["raw", "raw-uvloop"], indirect=True)
AT_LEISURE = pytest.mark.parametrize("wire", ["raw-timed"], indirect=True)
LIMIT = 64 * 1024 * 1024


class Speaker:
    """The server's end of one WebSocket, over a ``Peer``."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.protocol = ServerProtocol(max_size=None)
        self.frames: list[Frame] = []
        self.head = b""

    async def accept(self, **headers: str) -> Speaker:
        """Agree to the handshake, with these headers in the answer."""
        self.head = await self.peer.head()
        if not self.head:
            raise anyio.EndOfStream
        self.protocol.receive_data(self.head)
        (request,) = self.protocol.events_received()
        assert isinstance(request, Request)
        response = self.protocol.accept(request)
        for name, value in headers.items():
            response.headers[name.replace("_", "-")] = value
        self.protocol.send_response(response)
        await self.flush()
        return self

    async def next(self) -> Frame | None:
        """The next frame, None at the end."""
        while not self.frames:
            data = await self.peer.receive()
            if not data:
                return None
            self.protocol.receive_data(data)
            await self.flush()
            self.frames += [event for event in self.protocol.events_received() if isinstance(event, Frame)]
        return self.frames.pop(0)

    async def send(self, opcode: Opcode, data: bytes, *, fin: bool = True) -> None:
        await self.raw(Frame(opcode, data, fin).serialize(mask=False))

    async def raw(self, data: bytes) -> None:
        await self.peer.send(data)

    async def close(self, code: int | None = None, reason: str = "") -> None:
        self.protocol.send_close(code, reason)
        await self.flush()

    async def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                await self.peer.send(data)


Talk = Callable[[Speaker], Awaitable[None]]


@asynccontextmanager
async def talking(wire: str, talk: Talk, *, tls: bool = False) -> AsyncIterator[tuple[Server, Transport]]:
    """A server that accepts every WebSocket and then talks like this."""

    async def script(peer: Peer) -> None:
        await talk(await Speaker(peer).accept())

    async with serve(script, tls=tls) as server, connect(server, wire) as transport:
        yield server, transport


@asynccontextmanager
async def opened(wire: str, talk: Talk, *, limit: int = LIMIT) -> AsyncIterator[WebSocket]:
    """A WebSocket to such a server."""
    async with talking(wire, talk) as (_, transport), transport.open_websocket(b"/", [HOST], max_message=limit) as it:
        yield it


async def echo(speaker: Speaker) -> None:
    while (frame := await speaker.next()) is not None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            await speaker.send(frame.opcode, bytes(frame.data))


async def silent(speaker: Speaker) -> None:
    while await speaker.next() is not None:
        pass


# Messages


@RAW
async def test_messages_both_ways(wire: str) -> None:
    big = bytes(range(256)) * 40960
    messages: list[str | bytes] = ["hello", b"\x00\xff", "", b"", "é🎤", big, "x" * 70_000, big.decode("latin-1")]
    async with opened(wire, echo) as socket:
        assert socket.is_open()
        assert repr(socket) == "<WebSocket open>"
        total = 0
        for message in messages:
            await socket.send(message)
            assert await socket.receive() == message
            total += len(message.encode() if isinstance(message, str) else message)
        assert socket.bytes_received == total


@RAW
async def test_many_at_once_keep_their_order_and_bounds(wire: str) -> None:
    async with opened(wire, echo) as socket, anyio.create_task_group() as tasks:

        async def ask() -> None:
            for number in range(2000):
                await socket.send(str(number))

        tasks.start_soon(ask)
        assert [await socket.receive() for _ in range(2000)] == [str(number) for number in range(2000)]


@RAW
async def test_fragments_with_a_ping_between(wire: str) -> None:
    seen: list[Frame | None] = []
    over = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        for opcode in (Opcode.TEXT, Opcode.BINARY):
            await speaker.send(opcode, b"\xc3", fin=False)
            await speaker.send(Opcode.PING, b"are you there")
            await speaker.send(Opcode.CONT, b"", fin=False)
            await speaker.send(Opcode.CONT, b"\xa9")
            seen.append(await speaker.next())
        over.set()
        await silent(speaker)

    async with opened(wire, talk) as socket:
        assert await socket.receive() == "é"
        assert await socket.receive() == "é".encode()
        await over.wait()
    assert [(frame.opcode, bytes(frame.data)) for frame in seen if frame] == [(Opcode.PONG, b"are you there")] * 2


@RAW
async def test_one_byte_at_a_time(wire: str) -> None:
    async def talk(speaker: Speaker) -> None:
        for byte in Frame(Opcode.TEXT, "é".encode() * 100).serialize(mask=False):
            await speaker.raw(bytes([byte]))
            await anyio.lowlevel.checkpoint()
        await silent(speaker)

    async with opened(wire, talk) as socket:
        assert await socket.receive() == "é" * 100


# The handshake


@RAW
async def test_what_is_asked_and_answered(wire: str) -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        speaker = await Speaker(peer).accept(Sec_WebSocket_Protocol="b", X_Two="2")
        heads.append(speaker.head)
        await silent(speaker)

    headers = [HOST, (b"authorization", b"Bearer k"), (b"x-name", "é".encode("latin-1"))]
    async with serve(script) as server, connect(server, wire) as transport:
        offered = ["a", "b", "not a token", "é"]
        async with transport.open_websocket(b"/api/v1/x?y=%20", headers, offered, max_message=LIMIT) as socket:
            assert socket.subprotocol == "b"
            assert (b"x-two", b"2") in socket.headers
    first, *lines = heads[0].decode("latin-1").split("\r\n")[:-2]
    assert first == "GET /api/v1/x?y=%20 HTTP/1.1"
    key = next(line for line in lines if line.startswith("sec-websocket-key: "))
    assert lines == [
        "host: upstream",
        "authorization: Bearer k",
        "x-name: é",
        "upgrade: websocket",
        "connection: Upgrade",
        key,
        "sec-websocket-version: 13",
        "sec-websocket-protocol: a, b",
    ]


@RAW
async def test_no_subprotocol(wire: str) -> None:
    async with opened(wire, silent) as socket:
        assert socket.subprotocol is None


@RAW
async def test_a_request_that_cannot_be_written(wire: str) -> None:
    async with talking(wire, silent) as (_, transport):
        with pytest.raises(InvalidTarget):
            async with transport.open_websocket(b"/", [(b"a", b"b\r\nc: d")], max_message=LIMIT):
                pass


REFUSALS = {
    "length": (b"HTTP/1.1 403 No\r\nContent-Length: 2\r\nX-A: \xe9\r\n\r\nno", 403, b"no"),
    "chunked": (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", 503, b"no"),
    "until the end": (b"HTTP/1.1 404 Not Found\r\n\r\nnothing", 404, b"nothing"),
    "not a route for WebSockets": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", 302, b""),
}


@RAW
@pytest.mark.parametrize("kind", REFUSALS)
async def test_refused(wire: str, kind: str) -> None:
    data, status, body = REFUSALS[kind]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(data)

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(HandshakeRefused, match=str(status)) as caught:
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass
        assert server.connections == 1
    assert (caught.value.status, caught.value.body) == (status, body)
    if kind == "length":
        assert caught.value.headers == [(b"content-length", b"2"), (b"x-a", b"\xe9")]


NONSENSE = {
    "garbage": b"\x00\xff this is not HTTP\r\n\r\n",
    "another protocol": b"HTTP/2 101 Switching\r\n\r\n",
    "no upgrade": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "another key": b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: abc\r\n\r\n",
    "a long line": b"HTTP/1.1 101 S\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "a large body": b"HTTP/1.1 403 No\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000,
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\n\r\n",
}


@RAW
@pytest.mark.parametrize("kind", NONSENSE)
async def test_nonsense_for_a_handshake(wire: str, kind: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(NONSENSE[kind])
        await peer.gone()

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamInvalidResponse):
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass


@RAW
@pytest.mark.parametrize(
    "headers", [{"Sec_WebSocket_Protocol": "c"}, {"Sec_WebSocket_Extensions": "permessage-deflate"}]
)
async def test_the_server_chooses_what_was_not_offered(wire: str, headers: dict[str, str]) -> None:
    async def script(peer: Peer) -> None:
        await silent(await Speaker(peer).accept(**headers))

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamInvalidResponse):
            async with transport.open_websocket(b"/", [HOST], ["a"], max_message=LIMIT):
                pass


@RAW
@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 101 Swi", b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\nno"])
async def test_hung_up_instead(wire: str, data: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(data)

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamDisconnected):
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass


@RAW
async def test_no_answer_in_time(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    async with serve(script) as server, connect(server, wire, Timeouts(first_byte=0.05)) as transport:
        with pytest.raises(UpstreamTimeout):
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass


@AT_LEISURE
async def test_the_limit_on_the_answer_is_not_one_on_silence(wire: str) -> None:
    proceed = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        await proceed.wait()
        await speaker.send(Opcode.TEXT, b"at last")
        await silent(speaker)

    async def script(peer: Peer) -> None:
        await talk(await Speaker(peer).accept())

    timeouts = Timeouts(first_byte=5, idle=5)
    async with (
        serve(script) as server,
        connect(server, wire, timeouts) as transport,
        transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket,
    ):
        with anyio.move_on_after(20) as wait:
            await socket.receive()
        assert wait.cancelled_caught
        proceed.set()
        assert await socket.receive() == "at last"


@RAW
async def test_nobody_listens(wire: str) -> None:
    async with connect(Address("http", "127.0.0.1", free_port()), wire) as transport:
        with pytest.raises(UpstreamUnavailable):
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass


@pytest.mark.parametrize("wire", ["httpx", "httpx-trio"], indirect=True)
async def test_without_asyncio_it_is_refused(wire: str) -> None:
    async with connect(Address("http", "127.0.0.1", 9), wire) as transport:
        with pytest.raises(UpstreamUnavailable, match="asyncio only"):
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass


@RAW
async def test_unix_socket(wire: str, tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    def echo_all(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with unix_serve(echo_all, path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with anyio.fail_after(DEADLINE):
            async with (
                connect(Address("http", "localhost", 80, uds=path), wire) as transport,
                transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket,
            ):
                await socket.send("over a file")
                assert await socket.receive() == "over a file"
        server.shutdown()
        thread.join()


@RAW
async def test_tls(wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with talking(wire, echo, tls=True) as (_, transport):
        with pytest.raises(UpstreamUnavailable) as caught:
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    certificate = tmp_path / "authority.pem"
    authority().cert_pem.write_to_path(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with (
        talking(wire, echo, tls=True) as (_, transport),
        transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket,
    ):
        await socket.send(b"x" * 1_000_000)
        assert await socket.receive() == b"x" * 1_000_000


@RAW
async def test_nothing_of_it_is_logged(wire: str, caplog: pytest.LogCaptureFixture) -> None:
    # The double logs as websockets does; what is tested is the name that ours logs under.
    caplog.set_level(logging.DEBUG, logger="fluidmcp_proxy.upstream")
    async with opened(wire, echo) as socket:
        await socket.send("secret")
        await socket.receive()
    assert [record.name for record in caplog.records if record.name.startswith("fluidmcp_proxy")] == []


# Ends that the server makes


@RAW
@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 3000, 4999, None])
async def test_closed_by_the_server(wire: str, code: int | None) -> None:
    answers: list[Frame | None] = []
    over = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        await speaker.send(Opcode.TEXT, b"last words")
        await speaker.close(code, "because é" if code else "")
        answers.append(await speaker.next())
        over.set()

    async with opened(wire, talk) as socket:
        assert await socket.receive() == "last words"
        for _ in range(2):
            with pytest.raises(WebSocketClosed) as caught:
                await socket.receive()
        await socket.send("dropped")
        await socket.close(1000)
        assert repr(socket) == "<WebSocket closed>"
        await over.wait()
    assert (caught.value.code, caught.value.reason) == ((code, "because é") if code else (1005, ""))
    answer = answers[0]
    assert answer is not None
    assert Close.parse(bytes(answer.data)).code == (code or 1005)


@RAW
@pytest.mark.parametrize("how", ["fin", "rst", "inside a frame"])
async def test_lost(wire: str, how: str) -> None:
    received = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        await speaker.send(Opcode.TEXT, b"last words")
        if how == "inside a frame":
            await speaker.raw(b"\x81\x05ab")
        await received.wait()
        if how == "rst":
            speaker.peer.reset()

    async with opened(wire, talk) as socket:
        assert await socket.receive() == "last words"
        received.set()
        with pytest.raises(UpstreamDisconnected):
            await socket.receive()
        await socket.send("dropped")
        await socket.close(1000)


BAD = {
    "reserved opcode": (b"\x83\x00", 1002),
    "reserved bit": (b"\xc1\x00", 1002),
    "masked": (b"\x81\x80abcd", 1002),
    "continuation of nothing": (b"\x80\x00", 1002),
    "a close code that is none": (b"\x88\x02\x03\xee", 1002),
    "a close inside a message": (b"\x01\x00\x88\x00", 1002),
    "a long ping": (b"\x89\x7e\x00\x7e" + b"x" * 126, 1002),
    "no UTF-8": (b"\x81\x01\xff", 1007),
    "too large": (b"\x82\x7e\x03\xe9" + b"x" * 1001, 1009),
    "too large in fragments": (b"\x02\x7e\x03\xe8" + b"x" * 1000 + b"\x80\x01x", 1009),
}


@RAW
@pytest.mark.parametrize("kind", BAD)
async def test_a_server_that_breaks_the_rules(wire: str, kind: str) -> None:
    data, code = BAD[kind]
    answers: list[Frame | None] = []
    over = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        await speaker.raw(b"\x81\x04good" + data + b"\x81\x04late")
        answers.append(await speaker.next())
        over.set()

    async with opened(wire, talk, limit=1000) as socket:
        assert await socket.receive() == "good"
        with pytest.raises(UpstreamInvalidResponse):
            await socket.receive()
        await over.wait()
    answer = answers[0]
    assert answer is not None
    assert answer.opcode is Opcode.CLOSE
    assert Close.parse(bytes(answer.data)).code == code


# Ends that this side makes


@RAW
@pytest.mark.parametrize(
    ("code", "reason", "seen"),
    [
        (1000, "", (1000, "")),
        (1001, "bye é", (1001, "bye é")),
        (4321, "é" * 100, (4321, "é" * 61)),
        (1005, "", (1005, "")),
        (1006, "lost", (1005, "")),
        (1015, "", (1005, "")),
        (0, "", (1005, "")),
        (5000, "", (1005, "")),
    ],
)
async def test_closed_by_us(wire: str, code: int, reason: str, seen: tuple[int, str]) -> None:
    answers: list[Frame | None] = []

    async def talk(speaker: Speaker) -> None:
        for _ in range(100):
            await speaker.send(Opcode.TEXT, b"nobody reads this" * 1000)
        answers.append(await speaker.next())

    async with opened(wire, talk) as socket:
        await socket.close(code, reason)
        assert not socket.is_open()
    close = Close.parse(bytes(answers[0].data)) if answers[0] else None
    assert close == Close(*seen)


def test_which_codes_can_be_sent() -> None:
    allowed = [code for code in range(6000) if can_be_sent(code)]
    assert allowed == [*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)]


@RAW
async def test_a_server_that_does_not_answer_the_close(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_CLOSE_TIMEOUT", 0.05)
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await Speaker(peer).accept()
        await peer.gone()  # reads, and says nothing
        gone.set()

    async with serve(script) as server, connect(server, wire) as transport:
        async with transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await socket.close(1000)
            assert not socket.is_open()
        await gone.wait()


@RAW
async def test_leaving_says_that_it_goes_away(wire: str) -> None:
    answers: list[Frame | None] = []
    over = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        answers.append(await speaker.next())
        over.set()

    async with talking(wire, talk) as (_, transport):
        async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
            pass
        await over.wait()
    assert answers[0] is not None
    assert Close.parse(bytes(answers[0].data)).code == 1001


@RAW
async def test_closing_the_transport_ends_it(wire: str) -> None:
    async with talking(wire, silent) as (_, transport):
        async with transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket:
            assert "1 connections" in repr(transport)
            await transport.aclose()
            with pytest.raises(UpstreamDisconnected):
                await socket.receive()
        with pytest.raises(UpstreamUnavailable):
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT):
                pass
        assert "0 connections" in repr(transport)


@RAW
@pytest.mark.parametrize("closing", [False, True])
async def test_cancelled_after_any_number_of_turns(wire: str, closing: bool) -> None:
    """The server sees the end each time, and the transport keeps nothing."""
    ended: list[int] = []

    async def script(peer: Peer) -> None:
        try:
            await echo(await Speaker(peer).accept())
        finally:
            ended.append(peer.number)

    async with serve(script) as server, connect(server, wire) as transport:
        complete, turns = False, 0

        async def one() -> None:
            nonlocal complete
            async with transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket:
                for message in ("a", b"b" * 300_000):
                    await socket.send(message)
                    assert await socket.receive() == message
                if closing:
                    await socket.close(1000)
            complete = True

        while not complete:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            turns += 1
        assert turns > 5, "it was never cancelled inside"
        while len(ended) < server.connections or "0 connections" not in repr(transport):
            await anyio.sleep(0.01)


# Flow control and pings


@RAW
async def test_a_slow_reader_slows_the_server(wire: str) -> None:
    sent = 0

    async def talk(speaker: Speaker) -> None:
        nonlocal sent
        while True:
            await speaker.send(Opcode.BINARY, b"x" * 10_000)
            sent += 10_000

    async with opened(wire, talk) as socket:
        await socket.receive()
        await _until_still(lambda: sent)
        assert sent < 50_000_000
        before = sent
        for _ in range(before // 10_000):
            await socket.receive()
        await _until(lambda: sent > before)
        assert "open" in repr(socket)


@RAW
async def test_a_server_that_does_not_read_slows_the_sender(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_HOLD", DEADLINE)  # or the sender goes on four times a second
    proceed = anyio.Event()
    seen = sent = 0

    async def talk(speaker: Speaker) -> None:
        nonlocal seen
        speaker.peer.stop_reading()
        await proceed.wait()
        while await speaker.next() is not None:
            seen += 1

    async with opened(wire, talk) as socket, anyio.create_task_group() as tasks:

        async def send() -> None:
            nonlocal sent
            for _ in range(1000):
                await socket.send(b"x" * 100_000)
                sent += 1

        tasks.start_soon(send)
        await _until_still(lambda: sent)
        assert sent < 500
        proceed.set()
        await _until(lambda: seen == 1000)


@RAW
async def test_what_a_server_does_not_read_piles_up_to_one_message_of_the_largest_size(
    wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the sender's own side is looked at again."""
    monkeypatch.setattr(websocket, "_HOLD", 0.001)
    limit, size, proceed, seen = 5_000_000, 50_000, anyio.Event(), 0

    async def talk(speaker: Speaker) -> None:
        nonlocal seen
        speaker.peer.stop_reading()
        await proceed.wait()
        while await speaker.next() is not None:
            seen += 1

    async with opened(wire, talk, limit=limit) as socket, anyio.create_task_group() as tasks:

        async def send() -> None:
            for _ in range(1000):
                await socket.send(b"x" * size)

        tasks.start_soon(send)
        await _until_still(socket._transport.get_write_buffer_size)
        assert limit < socket._transport.get_write_buffer_size() < limit + 2 * size
        assert seen == 0
        proceed.set()
        await _until(lambda: seen == 1000)


@RAW
async def test_a_sender_that_waits_is_let_go_when_the_connection_is_lost(
    wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "_HOLD", DEADLINE)
    proceed = anyio.Event()

    async def talk(speaker: Speaker) -> None:
        speaker.peer.stop_reading()
        await proceed.wait()

    async with opened(wire, talk) as socket, anyio.create_task_group() as tasks:
        sent = 0

        async def send() -> None:
            nonlocal sent
            while socket.is_open():
                await socket.send(b"x" * 1_000_000)
                sent += 1

        tasks.start_soon(send)
        await _until_still(lambda: sent)
        proceed.set()


@RAW
async def test_a_silent_server_is_pinged(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_AFTER", 0.02)
    pings = 0

    async def talk(speaker: Speaker) -> None:
        nonlocal pings
        while pings < 3:
            frame = await speaker.next()
            assert frame is not None
            assert frame.opcode is Opcode.PING
            pings += 1
        await speaker.send(Opcode.TEXT, b"enough")
        await silent(speaker)

    async with opened(wire, talk) as socket:
        assert await socket.receive() == "enough"
    assert pings == 3


@RAW
async def test_a_server_that_answers_no_ping_is_dead_in_the_end(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_AFTER", 0.02)
    monkeypatch.setattr(websocket, "PATIENCE", 0.2)
    pings: list[bytes] = []

    async def script(peer: Peer) -> None:
        speaker = await Speaker(peer).accept()
        while data := await speaker.peer.receive():
            pings.append(data)

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        transport.open_websocket(b"/", [HOST], max_message=LIMIT) as socket,
    ):
        with pytest.raises(UpstreamTimeout):
            await socket.receive()
    assert pings


@AT_LEISURE
async def test_a_server_that_is_paused_is_not_taken_for_dead(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_AFTER", 0.01)
    monkeypatch.setattr(websocket, "PATIENCE", 0.05)
    sent = 0

    async def talk(speaker: Speaker) -> None:
        nonlocal sent
        for _ in range(200):
            await speaker.send(Opcode.BINARY, b"x" * 100_000)
            sent += 1
        await silent(speaker)

    async with opened(wire, talk) as socket:
        await socket.receive()
        await _until_still(lambda: sent)
        assert sent < 200
        for _ in range(199):
            assert await socket.receive() == b"x" * 100_000


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.sleep(0.01)


async def _until_still(value: Callable[[], int]) -> None:
    """Until ``value()`` has been the same, and not 0, for twenty looks."""
    same, last = 0, 0
    while same < 20:
        await anyio.sleep(0.01)
        same, last = (same + 1 if value() == last != 0 else 0), value()
