"""What goes over the wire, how bodies are sent, and what cannot be sent at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from fluidmcp_proxy.errors import InvalidTarget, UpstreamDisconnected, UpstreamTimeout
from fluidmcp_proxy.upstream.client import Address, Timeouts
from tests.serving import DEADLINE

from .conftest import TIMED
from .scripted import HOST, OK, Peer, ask, connect, serve

pytestmark = pytest.mark.anyio

RAW = pytest.mark.parametrize("wire", ["raw", "raw-uvloop"], indirect=True)
AT_LEISURE = pytest.mark.parametrize("wire", TIMED, indirect=True)


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


class Recorder:
    """Answers after a head, with what ``size`` or ``end`` say of its body."""

    def __init__(self, size: int = 0, end: bytes = b"") -> None:
        self.size = size
        self.end = end
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []

    async def __call__(self, peer: Peer) -> None:
        while head := await peer.head():
            self.heads.append(head)
            self.bodies.append(await (peer.until(self.end) if self.end else peer.body(self.size)))
            await peer.send(OK)


@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"OPTIONS", b"PROPFIND", b"get", b"X-ODD"])
async def test_request_line_is_byte_for_byte(wire: str, method: bytes) -> None:
    script = Recorder()
    target = b"//v1/../a%2F%41;b?q=%20&&\"<>|{}[]'#frag"
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, method, target)
    assert script.heads == [method + b" " + target + b" HTTP/1.1\r\nhost: upstream\r\n\r\n"]


async def test_headers_are_sent_as_given(wire: str) -> None:
    script = Recorder()
    fields = [(b"accept", b"*/*"), (b"x-b", b"1"), (b"x-a", b"\xe4;,"), (b"x-b", b"2"), (b"cookie", b"a=b")]
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, headers=fields)
    expected = b"".join(b"%b: %b\r\n" % pair for pair in [HOST, *fields])
    assert script.heads == [b"GET / HTTP/1.1\r\n" + expected + b"\r\n"]


async def test_no_cookie_is_kept(wire: str) -> None:
    heads = []

    async def script(peer: Peer) -> None:
        while head := await peer.head():
            heads.append(head)
            await peer.send(b"HTTP/1.1 302 Found\r\nset-cookie: a=b\r\nlocation: /other\r\ncontent-length: 0\r\n\r\n")

    async with serve(script) as server, connect(server, wire) as transport:
        assert [(await ask(transport)).status for _ in range(2)] == [302, 302]
    assert heads == [b"GET / HTTP/1.1\r\nhost: upstream\r\n\r\n"] * 2


async def test_body_in_bytes(wire: str) -> None:
    script = Recorder(5)
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, b"POST", body=b"hello")
        await ask(transport, b"POST", headers=[(b"content-length", b"5")], body=b"hello")
        assert server.connections == 1
    assert script.bodies == [b"hello"] * 2
    assert all(head.count(b"content-length: 5\r\n") == 1 for head in map(bytes.lower, script.heads))


async def test_large_body_in_bytes(wire: str) -> None:
    body = bytes(range(256)) * 4096
    script = Recorder(len(body))
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, b"POST", body=body)
        await ask(transport, b"POST", body=body)
        assert server.connections == 1
    assert script.bodies == [body] * 2


@pytest.mark.parametrize("body", [b"", None])
async def test_post_without_content_says_so(wire: str, body: bytes | None) -> None:
    script = Recorder()
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, b"POST", body=body)
    assert b"content-length: 0\r\n" in script.heads[0].lower()


async def test_streamed_body_of_unknown_length_is_chunked(wire: str) -> None:
    script = Recorder(end=b"0\r\n\r\n")
    async with serve(script) as server, connect(server, wire) as transport:
        for _ in range(2):
            await ask(transport, b"POST", body=pieces(b"one", b"", b"twenty bytes of body"))
        assert server.connections == 1
    assert script.bodies == [b"3\r\none\r\n14\r\ntwenty bytes of body\r\n0\r\n\r\n"] * 2
    assert b"transfer-encoding: chunked\r\n" in script.heads[0].lower()
    assert b"content-length" not in script.heads[0].lower()


async def test_streamed_body_of_known_length(wire: str) -> None:
    script = Recorder(6)
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, b"POST", headers=[(b"content-length", b"6")], body=pieces(b"abc", b"", b"def"))
    assert script.bodies == [b"abcdef"]
    assert b"transfer-encoding" not in script.heads[0].lower()


async def test_streamed_body_without_content(wire: str) -> None:
    script = Recorder(end=b"0\r\n\r\n")
    async with serve(script) as server, connect(server, wire) as transport:
        await ask(transport, b"POST", body=pieces())
    assert script.bodies == [b"0\r\n\r\n"]


async def test_body_longer_than_it_says_never_becomes_the_next_request(wire: str) -> None:
    received = []

    async def script(peer: Peer) -> None:
        await peer.head()
        while data := (peer.buffer or await peer.receive()):
            peer.buffer = b""
            received.append(data)

    smuggled = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(InvalidTarget):
            await ask(transport, b"POST", headers=[(b"content-length", b"2")], body=pieces(b"ab", smuggled))
    assert b"smuggled" not in b"".join(received)


async def test_body_shorter_than_it_says(wire: str) -> None:
    async with serve(Recorder(5)) as server, connect(server, wire) as transport:
        with pytest.raises(InvalidTarget):
            await ask(transport, b"POST", headers=[(b"content-length", b"5")], body=pieces(b"ab"))


class Left(Exception):
    pass


async def test_what_the_body_raises_comes_out_and_closes(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.gone()
        gone.set()

    async def broken() -> AsyncIterator[bytes]:
        yield b"ab"
        raise Left

    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(Left):
            await ask(transport, b"POST", body=broken())
        await gone.wait()


BAD = {
    "target with a space": (b"GET", b"/a b", []),
    "target with a line break": (b"GET", b"/a\r\nx: y", []),
    "empty target": (b"GET", b"", []),
    "target beyond ASCII": (b"GET", b"/\xe4", []),
    "target with a NUL": (b"GET", b"/\0", []),
    "method with a space": (b"GET /x", b"/", []),
    "empty method": (b"", b"/", []),
    "value with a line break": (b"GET", b"/", [(b"x", b"y\r\nz: 1")]),
    "value with a bare LF": (b"GET", b"/", [(b"x", b"y\nz: 1")]),
    "value with a bare CR": (b"GET", b"/", [(b"x", b"y\rz")]),
    "value with a NUL": (b"GET", b"/", [(b"x", b"y\0")]),
    "name with a line break": (b"GET", b"/", [(b"x\r\ny", b"z")]),
    "two lengths": (b"POST", b"/", [(b"content-length", b"1"), (b"content-length", b"1")]),
    "length that is none": (b"POST", b"/", [(b"content-length", b"+1")]),
    "wrong length": (b"POST", b"/", [(b"content-length", b"7")]),
    "transfer-encoding": (b"POST", b"/", [(b"transfer-encoding", b"chunked")]),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_cannot_be_written_is_not_sent(wire: str, case: str) -> None:
    method, target, headers = BAD[case]
    script = Recorder()
    async with serve(script) as server, connect(server, wire) as transport:
        with pytest.raises(InvalidTarget):
            await ask(transport, method, target, headers)
        assert (await ask(transport)).status == 200
    assert script.heads == [b"GET / HTTP/1.1\r\nhost: upstream\r\n\r\n"]


async def test_unix_socket(wire: str, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer_twice() -> None:
            with listener.accept()[0] as peer:
                for _ in range(2):
                    assert peer.recv(1000).startswith(b"GET /")
                    peer.sendall(OK)

        address = Address("http", "localhost", 80, uds=path)
        async with connect(address, wire) as transport, anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, answer_twice)
            assert (await ask(transport)).body == b"ok"
            assert (await ask(transport)).body == b"ok"


@RAW
@pytest.mark.parametrize("then", ["goes on", "hangs up", "hangs up hard"])
async def test_early_answer_while_the_upload_runs(wire: str, then: str) -> None:
    """The server refuses a body that it has not read; whatever it does then, its words arrive."""
    done = anyio.Event()

    async def script(peer: Peer) -> None:
        if (await peer.head()).startswith(b"GET"):
            await peer.send(OK)
            return
        await peer.send(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig")
        if then == "goes on":
            await peer.gone()
            done.set()
        elif then == "hangs up hard":
            peer.reset()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await anyio.sleep(0)

    async with serve(script) as server, connect(server, wire) as transport:
        if then == "hangs up hard":
            # The reset may overtake the answer: either is the truth.
            try:
                assert (await ask(transport, b"POST", body=endless())).status == 413
            except UpstreamDisconnected:
                pass
        else:
            answer = await ask(transport, b"POST", body=endless())
            assert (answer.status, answer.body) == (413, b"big")
        if then == "goes on":
            await done.wait()
        await ask(transport)
        assert server.connections == 2, "a connection with half a request on it was used again"


@RAW
async def test_early_answer_that_is_still_in_the_kernel_when_sending_fails(wire: str) -> None:
    """The loop has no turn between the server's last words and the upload's next write."""
    closed = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            with listener.accept()[0] as peer:
                peer.recv(10)  # the rest stays unread, so that closing resets
                peer.sendall(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig")
            closed.set()

        async def upload() -> AsyncIterator[bytes]:
            yield b"x"
            assert closed.wait(DEADLINE)
            while True:
                yield b"x" * 65536

        address = Address("http", "127.0.0.1", listener.getsockname()[1])
        with anyio.fail_after(DEADLINE):
            async with connect(address, wire) as transport, anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, refuse)
                answer = await ask(transport, b"POST", body=upload())
                assert (answer.status, answer.body) == (413, b"big")


@RAW
async def test_early_answer_while_the_client_is_silent(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\nno")
        await peer.gone()

    ended = anyio.Event()

    async def silent() -> AsyncIterator[bytes]:
        try:
            yield b"x"
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with serve(script) as server, connect(server, wire) as transport:
        answer = await ask(transport, b"POST", body=silent())
        assert (answer.status, answer.body) == (401, b"no")
        assert ended.is_set(), "the upload outlived its exchange"
        assert (await ask(transport, b"POST", body=silent())).status == 401
        assert server.connections == 2


async def test_slow_server_pauses_the_upload(wire: str) -> None:
    sent = 0
    go = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        await peer.head()
        await go.wait()
        await peer.skip(64 * 1024 * 1024)
        await peer.send(OK)

    async def upload() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1024):
            sent += 65536
            yield b"x" * 65536

    async def look() -> None:
        before = -1
        while sent != before or not sent:
            before = sent
            await anyio.sleep(0.05)
        stalled.append(sent)
        go.set()

    stalled: list[int] = []
    length = [(b"content-length", b"%d" % (64 * 1024 * 1024))]
    async with serve(script) as server, connect(server, wire) as transport, anyio.create_task_group() as tasks:
        await ask(transport)  # anyio's server pauses its socket only once it has waited for bytes
        tasks.start_soon(look)
        assert (await ask(transport, b"POST", headers=length, body=upload())).status == 200
    assert stalled[0] < 32 * 1024 * 1024
    assert sent == 64 * 1024 * 1024


@pytest.mark.parametrize("framing", ["length", "chunked", "until the end"])
async def test_slow_reader_pauses_the_server(wire: str, framing: str) -> None:
    sent = 0
    total = 64 * 1024 * 1024

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.head()
        piece = b"x" * 65536
        extra = b""
        if framing == "length":
            extra = b"content-length: %d\r\n" % total
        elif framing == "chunked":
            extra = b"transfer-encoding: chunked\r\n"
        await peer.send(b"HTTP/1.1 200 OK\r\n" + extra + b"\r\n")
        while sent < total:
            sent += len(piece)
            await peer.send(b"10000\r\n" + piece + b"\r\n" if framing == "chunked" else piece)
        if framing == "chunked":
            await peer.send(b"0\r\n\r\n")

    async with serve(script) as server, connect(server, wire) as transport:
        async with transport.exchange(b"GET", b"/", [HOST]) as answer:
            size = len(await answer.body.__anext__())
            before = -1
            while sent != before or not sent:
                before = sent
                await anyio.sleep(0.05)
            assert sent < total // 2
            largest = 0
            async for chunk in answer.body:
                size += len(chunk)
                largest = max(largest, len(chunk))
        assert size == total
        assert largest < 1024 * 1024


async def test_first_byte_too_late(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.gone()
        gone.set()

    async with serve(script) as server, connect(server, wire, Timeouts(5, 0.05, None)) as transport:
        with pytest.raises(UpstreamTimeout):
            await ask(transport)
        await gone.wait()


@AT_LEISURE
async def test_first_byte_time_begins_after_the_upload(wire: str) -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(5):
            await anyio.sleep(4)
            yield b"x"

    script = Recorder(5)
    length = [(b"content-length", b"5")]
    async with serve(script) as server, connect(server, wire, Timeouts(5, 15, None)) as transport:
        assert (await ask(transport, b"POST", headers=length, body=slow())).status == 200


async def test_first_byte_too_late_after_an_upload(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.gone()

    async def upload() -> AsyncIterator[bytes]:
        yield b"x"

    async with serve(script) as server, connect(server, wire, Timeouts(5, 0.05, None)) as transport:
        with pytest.raises(UpstreamTimeout):
            await ask(transport, b"POST", body=upload())


@pytest.mark.parametrize("wire", ["raw-timed"], indirect=True)
async def test_first_byte_time_ends_with_the_head(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        await anyio.sleep(20)
        await peer.send(b"ok")

    async with serve(script) as server, connect(server, wire, Timeouts(5, 15, None)) as transport:
        assert (await ask(transport)).body == b"ok"


async def test_silence_inside_the_body_too_long(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab")
        await peer.gone()
        gone.set()

    async with serve(script) as server, connect(server, wire, Timeouts(5, None, 0.05)) as transport:
        async with transport.exchange(b"GET", b"/", [HOST]) as answer:
            assert await answer.body.__anext__() == b"ab"
            with pytest.raises(UpstreamTimeout):
                await answer.body.__anext__()
        await gone.wait()


@AT_LEISURE
async def test_time_outs_do_not_outlive_what_they_limit(wire: str) -> None:
    async def script(peer: Peer) -> None:
        while await peer.head():
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
            for _ in range(4):
                await anyio.sleep(2)
                await peer.send(b"x")

    async with serve(script) as server, connect(server, wire, Timeouts(5, 3, 3)) as transport:
        for _ in range(5):
            assert (await ask(transport)).body == b"xxxx"
        assert server.connections == 1
