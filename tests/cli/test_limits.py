"""What ``fluidmcp run`` bears from its clients: silence, slowness, size and nonsense, on the uvicorn that is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fluidmcp_proxy.cli.protocol import GatewayProtocol
from tests.gateway.conftest import remote
from tests.serving import DEADLINE, eventually, serving, stub

PATIENCE = 0.3
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class App:
    """Answers as its path says, and notes what it was asked."""

    def __init__(self) -> None:
        self.headers: list[dict[bytes, bytes]] = []
        self.left: Counter[bytes] = Counter()  # by their queries, the clients that went away from /slow
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.loop = asyncio.get_running_loop()
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await self.echo(receive, send)
        else:
            await self.answer(scope, receive, send)

    async def echo(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})

    async def answer(self, scope: Message, receive: Receive, send: Send) -> None:
        self.headers.append(dict(scope["headers"]))
        if scope["path"] != "/early":
            while (await receive()).get("more_body"):
                pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        if scope["path"] == "/slow":
            await send({"type": "http.response.body", "body": b"o", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left[scope["query_string"]] += 1
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def app() -> App:
    return App()


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    with serving(app, "uvicorn-run") as port:
        yield port


@pytest.fixture(scope="module")
def impatient() -> Iterator[Impatient]:
    class Protocol(GatewayProtocol):
        head_timeout = PATIENCE

    app = App()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.serving.GatewayProtocol", Protocol)
        with serving(app, "uvicorn-run") as port:
            assert app.loop is not None
            yield Impatient(port, app.loop)


class Impatient:
    """A server that waits no longer than ``PATIENCE`` for a head."""

    def __init__(self, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.port = port
        self._loop = loop

    @contextlib.contextmanager
    def told(self, first: bytes) -> Iterator[socket.socket]:
        """A connection on which that much has come by the time that the server looks, however long it took us."""
        waits, goes_on = threading.Event(), threading.Event()

        def hold() -> None:
            waits.set()
            goes_on.wait(DEADLINE)

        self._loop.call_soon_threadsafe(hold)
        assert waits.wait(DEADLINE)
        try:
            with connection_to(self.port) as connection:
                connection.sendall(first)
                goes_on.set()
                yield connection
        finally:
            goes_on.set()


@contextlib.contextmanager
def connection_to(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def answered(connection: socket.socket) -> None:
    """Read one answer."""
    received = b""
    while not received.endswith(b"ok"):
        data = connection.recv(65536)
        assert data, received
        received += data
    assert received.startswith(b"HTTP/1.1 200 ")


def dribble(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte at a time, never silent, until the server has had enough; what it says."""
    for byte in data:
        with contextlib.suppress(OSError):  # it has closed in this moment; what it said is there to be read
            connection.sendall(bytes([byte]))
        if select.select([connection], [], [], PATIENCE / 20)[0]:
            return rest_of(connection)
    raise AssertionError("the server took all of it")


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    assert b"x-request-id: " in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_silence(impatient: Impatient) -> None:
    with connection_to(impatient.port) as connection:
        assert rest_of(connection) == b""


def test_a_head_that_dribbles(impatient: Impatient) -> None:
    with impatient.told(GET[:1]) as connection:
        assert error_of(dribble(connection, GET[1:-1] + b"x" * 1000)) == (408, "request_timeout")


def test_half_a_head(impatient: Impatient) -> None:
    with impatient.told(GET[:-4]) as connection:
        assert error_of(rest_of(connection)) == (408, "request_timeout")


def test_the_second_head_dribbles(impatient: Impatient) -> None:
    with impatient.told(GET) as connection:
        answered(connection)
        assert error_of(dribble(connection, GET[:-1] + b"x" * 1000)) == (408, "request_timeout")


def test_line_ends_for_ever(impatient: Impatient) -> None:
    """They may come before a request, and are no head yet."""
    with impatient.told(b"\r\n") as connection:
        assert error_of(dribble(connection, b"\r\n" * 500)) == (408, "request_timeout")


def test_a_body_that_nobody_wants_dribbles(impatient: Impatient) -> None:
    with impatient.told(POST.replace(b"/", b"/early", 1) + b"Content-Length: 1000\r\n\r\n") as connection:
        answered(connection)
        assert dribble(connection, b"x" * 1000) == b""


def test_between_requests_there_is_more_time(impatient: Impatient) -> None:
    with impatient.told(GET) as connection:
        answered(connection)
        for _ in range(2):
            time.sleep(2 * PATIENCE)  # the limit must be over; later is as good
            connection.sendall(GET)
            answered(connection)


def test_a_slow_body_and_a_slow_answer_are_not_its_business(impatient: Impatient) -> None:
    with impatient.told(POST + b"Content-Length: 2\r\n\r\nx") as connection:
        time.sleep(2 * PATIENCE)
        connection.sendall(b"y")
        answered(connection)
        connection.sendall(GET.replace(b"/", b"/slow", 1))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.settimeout(2 * PATIENCE)
        with pytest.raises(TimeoutError):
            rest_of(connection)


def test_a_websocket_lasts(impatient: Impatient) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    with impatient.told(GET[:-2] + upgrade + key + b"\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 101 ")
        for _ in range(3):
            connection.sendall(b"\x81\x81\0\0\0\0x")  # a text of one byte, and masked by zeros
            assert connection.recv(1000) == b"\x81\x01x"
            time.sleep(PATIENCE)


@pytest.mark.parametrize(
    "start",
    [
        GET[:-2] + b"X-A: ",
        b"GET /",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-A: ",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5;",
    ],
    ids=["a head", "a target", "trailers", "a chunk extension"],
)
def test_what_is_not_content_is_not_collected(port: int, start: bytes) -> None:
    """The client may send no more than the limit and what sockets hold."""
    with connection_to(port) as connection:
        connection.sendall(start)
        received = b""
        with pytest.raises(OSError):  # noqa: PT012 - the server has closed, at once or a moment later
            for _ in range(200):
                connection.sendall(b"a" * 100_000)
        with contextlib.suppress(ConnectionResetError):
            received = connection.recv(65536)
        assert not received or error_of(received) == (431, "headers_too_large")


def test_a_head_below_the_limit_is_none_of_its_business(port: int, app: App) -> None:
    with connection_to(port) as connection:
        connection.sendall(GET[:-2] + b"X-A: ")
        for _ in range(12):
            connection.sendall(b"a" * 10_000)
        connection.sendall(b"\r\n\r\n")
        answered(connection)
    assert len(app.headers[-1][b"x-a"]) == 120_000


@pytest.mark.parametrize(
    "request_", [b"\0\1\2\r\n\r\n", POST + b"Content-Length: +5\r\n\r\n", GET[:-2] + b"a b: c\r\n\r\n"]
)
def test_nonsense_gets_an_answer_of_ours(port: int, request_: bytes) -> None:
    with connection_to(port) as connection:
        connection.sendall(request_)
        assert error_of(rest_of(connection)) == (400, "invalid_target")


@pytest.mark.parametrize("between", [b"", GET], ids=["at once", "after another request"])
def test_nonsense_behind_a_request_does_not_get_into_its_answer(port: int, between: bytes) -> None:
    with connection_to(port) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1))
        received = connection.recv(1000)
        connection.sendall(between + b"\0\1\2\r\n\r\n")
        received += rest_of(connection)
    assert received.endswith((b"\r\n\r\no", b"\r\n\r\n"))
    assert received.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("pieces", [1, 2])
def test_trailers_are_no_headers(port: int, app: App, pieces: int) -> None:
    first, second = (
        POST + b"Transfer-Encoding: chunked\r\n\r\n",
        b"2\r\nab\r\n0\r\nauthorization: x\r\nhost: evil\r\n\r\n",
    )
    before = len(app.headers)
    with connection_to(port) as connection:
        connection.sendall(first + second if pieces == 1 else first)
        if pieces == 2:
            eventually(lambda: len(app.headers) > before, "the app runs")
            connection.sendall(second)
        answered(connection)
    assert app.headers[-1] == {b"host": b"x", b"transfer-encoding": b"chunked"}


def test_a_request_behind_an_upgrade_is_not_left_waiting(port: int) -> None:
    """The parser takes it for the other protocol's: the client has to know that the connection is over."""
    with connection_to(port) as connection:
        connection.sendall(GET[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert rest_of(connection).endswith(b"ok")


@pytest.mark.parametrize("behind", [0, 1, 3])
def test_a_client_that_leaves_is_missed_by_its_first_request_too(port: int, app: App, behind: int) -> None:
    query = b"%d" % behind
    before = app.left[query]
    with connection_to(port) as connection:
        connection.sendall(GET.replace(b"/", b"/slow?" + query, 1) + GET * behind)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    eventually(lambda: app.left[query] == before + 1, "it knows")


def test_few_requests_may_wait_behind_another(port: int, app: App) -> None:
    with connection_to(port) as connection:
        connection.sendall(GET * GatewayProtocol.max_pipelined)
        received = b""
        while received.count(b"\r\n\r\nok") < GatewayProtocol.max_pipelined:
            data = connection.recv(65536)
            assert data, received
            received += data
    before = len(app.headers)
    with connection_to(port) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1) + GET * 1000)
        assert rest_of(connection).count(b"HTTP/1.1 200 ") <= 1
    assert len(app.headers) <= before + 1


def test_a_client_that_never_reads_holds_little() -> None:
    """uvicorn keeps no more for it than a transport's high-water mark and what the relay sends at once."""
    held: list[int] = []

    class Measured(GatewayProtocol):
        def pause_writing(self) -> None:
            held.append(self.transport.get_write_buffer_size())
            super().pause_writing()

    with pytest.MonkeyPatch.context() as patch, stub() as upstream:
        patch.setattr("tests.serving.GatewayProtocol", Measured)
        with serving(remote(upstream), "uvicorn-run") as port, connection_to(port) as connection:
            connection.sendall(b"GET /m/v1/bytes/200000000 HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: held, "the writer is paused")
            assert connection.recv(100)
    assert max(held) < 1024 * 1024


def test_what_is_overridden_is_there() -> None:
    """A uvicorn that renames a hook would otherwise lift a limit in silence."""
    names = [name for name in vars(GatewayProtocol) if callable(getattr(GatewayProtocol, name))]
    ours = {"_waits_for_a_head", "_too_late", "_refuse"}
    assert {name for name in names if not hasattr(HttpToolsProtocol, name)} == ours
