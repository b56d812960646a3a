"""What servers may answer, what they may not, and what becomes of it."""

from __future__ import annotations

import anyio
import pytest

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamError, UpstreamInvalidResponse, UpstreamUnavailable
from fluidmcp_proxy.upstream.client import Address

from .scripted import HOST, OK, Peer, answering, ask, connect, serve

pytestmark = pytest.mark.anyio

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

GOOD = {
    "content-length": (OK, 200, b"ok"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "not modified, with the length of what was not sent": (
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
        304,
        b"",
    ),
    "empty": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b""),
    "chunked": (CHUNKED + b"2\r\nab\r\n3;x=y\r\ncde\r\n0\r\n\r\n", 200, b"abcde"),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\nx-evil: 1\r\nset-cookie: a\r\n\r\n", 200, b"a"),
    "continue": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
    "early hints, twice": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 2 + OK, 200, b"ok"),
    "no reason": (b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
    "unknown status": (b"HTTP/1.1 599 Odd\r\ncontent-length: 2\r\n\r\nok", 599, b"ok"),
    "upgrade offered": (
        b"HTTP/1.1 200 OK\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nok",
        200,
        b"ok",
    ),
    "40 KB of headers": (
        b"HTTP/1.1 200 OK\r\nx-big: " + b"b" * 40_000 + b"\r\ncontent-length: 2\r\n\r\nok",
        200,
        b"ok",
    ),
}

# The second: the server closes afterwards.
CLOSING = {
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\nall of it", 200, b"all of it"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
    "HTTP/1.0 until the end": (b"HTTP/1.0 200 OK\r\n\r\nold", 200, b"old"),
    "connection: close": (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
    "empty until the end": (b"HTTP/1.1 200 OK\r\n\r\n", 200, b""),
}

NONSENSE = {
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "not HTTP/1": b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "two content-lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok!",
    "negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    "length that is none": b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok",
    "chunked, then a length": CHUNKED[:-2] + b"content-length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a length, then chunked": OK[:-4].replace(b"2", b"2\r\ntransfer-encoding: chunked") + b"\r\n2\r\nok\r\n0\r\n\r\n",
    "another transfer coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nxx",
    "two transfer codings": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "space in a name": b"HTTP/1.1 200 OK\r\nx y: 1\r\ncontent-length: 2\r\n\r\nok",
    "header without colon": b"HTTP/1.1 200 OK\r\nnonsense\r\ncontent-length: 2\r\n\r\nok",
    "200 KB of headers": b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"a" * 200_000 + b"\r\ncontent-length: 2\r\n\r\nok",
    "200 KB of small headers": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 33_000 + b"content-length: 2\r\n\r\nok",
    "a header without end": b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"a" * 300_000,
    "chunk size that is none": CHUNKED + b"zz\r\nab\r\n0\r\n\r\n",
    "chunk longer than it says": CHUNKED + b"1\r\nabcd\r\n0\r\n\r\n",
    "enormous chunk size": CHUNKED + b"f" * 40 + b"\r\nab",
}

CUT = {
    "nothing": b"",
    "in the status line": b"HTTP/1.1 20",
    "in the head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "in a body of known length": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab",
    "before a body of known length": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
    "before a chunk": CHUNKED,
    "in a chunk": CHUNKED + b"5\r\nab",
    "between chunks": CHUNKED + b"2\r\nab\r\n",
    "in a chunk's size": CHUNKED + b"2\r\nab\r\n1",
    "in the last chunk": CHUNKED + b"2\r\nab\r\n0\r\n",
}


@pytest.mark.parametrize("case", GOOD)
async def test_good_answer_and_the_connection_is_used_again(wire: str, case: str) -> None:
    data, status, body = GOOD[case]
    async with serve(answering(data)) as server, connect(server, wire) as transport:
        for _ in range(3):
            answer = await ask(transport)
            assert (answer.status, answer.body) == (status, body)
            assert not [name for name, _ in answer.headers if name in (b"x-evil", b"set-cookie", b"link")]
        assert server.connections == 1


@pytest.mark.parametrize("case", CLOSING)
async def test_answer_that_ends_with_the_connection(wire: str, case: str) -> None:
    data, status, body = CLOSING[case]
    async with serve(answering(data, then_close=True)) as server, connect(server, wire) as transport:
        for _ in range(2):
            answer = await ask(transport)
            assert (answer.status, answer.body) == (status, body)
        assert server.connections == 2


@pytest.mark.parametrize("case", NONSENSE)
async def test_nonsense_is_an_invalid_response(wire: str, case: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(NONSENSE[case])
        await peer.gone()

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamInvalidResponse):
            await ask(transport)
        with pytest.raises(UpstreamInvalidResponse):
            await ask(transport)
        assert server.connections == 2


@pytest.mark.parametrize("case", CUT)
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_answer_that_breaks_off(wire: str, case: str, how: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(CUT[case])
        if how == "rst":
            peer.reset()

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamDisconnected):
            await ask(transport)


async def test_a_body_until_the_end_that_is_reset_is_not_complete(wire: str) -> None:
    seen = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await seen.wait()
        peer.reset()

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        transport.exchange(b"GET", b"/", [HOST]) as answer,
    ):
        assert await answer.body.__anext__() == b"half"
        seen.set()
        with pytest.raises(UpstreamDisconnected):
            await answer.body.__anext__()


async def test_bytes_before_the_break_arrive(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(CHUNKED + b"5\r\nhello\r\n")

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        transport.exchange(b"GET", b"/", [HOST]) as answer,
    ):
        assert await answer.body.__anext__() == b"hello"
        with pytest.raises(UpstreamDisconnected):
            await answer.body.__anext__()


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", CHUNKED, b"HTTP/1.1 200 OK\r\n\r\n"],
    ids=["length", "chunked", "until the end"],
)
async def test_head_has_no_body_whatever_the_headers_say(wire: str, head: bytes) -> None:
    async with serve(answering(head)) as server, connect(server, wire) as transport:
        answer = await ask(transport, b"HEAD")
        assert (answer.status, answer.body) == (200, b"")
        assert (await ask(transport, b"HEAD")).status == 200


async def test_headers_keep_order_repetition_and_values(wire: str) -> None:
    fields = [
        (b"b", b"1"),
        (b"set-cookie", b"x=1"),
        (b"a", b"2, 3"),
        (b"set-cookie", b"y=2"),
        (b"b", b"\xe4 x"),
        (b"e", b""),
    ]
    head = b"".join(b"%b:  %b\r\n" % (name.title(), value) for name, value in fields)
    data = b"HTTP/1.1 200 Fine by me\r\n" + head + b"Content-Length: 0\r\n\r\n"
    async with serve(answering(data)) as server, connect(server, wire) as transport:
        answer = await ask(transport)
        assert answer.headers == [*fields, (b"content-length", b"0")]
        assert answer.reason == b"Fine by me"


async def test_nothing_is_decoded(wire: str) -> None:
    data = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x00\xff"
    async with serve(answering(data)) as server, connect(server, wire) as transport:
        assert (await ask(transport)).body == b"\x1f\x8b\x00\xff"


async def test_one_byte_at_a_time(wire: str) -> None:
    async def script(peer: Peer) -> None:
        while await peer.head():
            for byte in CHUNKED + b"2\r\nab\r\nA\r\n0123456789\r\n0\r\n\r\n":
                await peer.send(bytes([byte]))

    async with serve(script) as server, connect(server, wire) as transport:
        for _ in range(2):
            assert (await ask(transport)).body == b"ab0123456789"
        assert server.connections == 1


async def test_a_chunk_arrives_before_the_next_is_sent(wire: str) -> None:
    taken = [anyio.Event() for _ in range(3)]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(CHUNKED)
        for number, event in enumerate(taken):
            await peer.send(b"6\r\ndata %d\r\n" % number)
            await event.wait()
        await peer.send(b"0\r\n\r\n")

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        transport.exchange(b"GET", b"/", [HOST]) as answer,
    ):
        for number, event in enumerate(taken):
            assert await answer.body.__anext__() == b"data %d" % number
            event.set()
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await answer.body.__anext__()


async def test_nobody_listens(wire: str) -> None:
    async with connect(Address("http", "127.0.0.1", 1), wire) as transport:
        with pytest.raises(UpstreamUnavailable):
            await ask(transport)


async def test_no_such_host(wire: str) -> None:
    async with connect(Address("http", "a..b", 80), wire) as transport:
        with pytest.raises(UpstreamError):
            await ask(transport)


@pytest.mark.parametrize("wire", ["raw", "raw-uvloop"], indirect=True)
async def test_a_trailer_without_end_is_not_collected(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(CHUNKED + b"1\r\na\r\n0\r\nx: ")
        for _ in range(100):
            await peer.send(b"a" * 10_000)

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamInvalidResponse):
            await ask(transport)
