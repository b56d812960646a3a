"""What ``fluidmcp run`` bears from its clients: silence, slowness, size and nonsense, on the uvicorn that is there."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from websockets.sync.client import connect

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
        self.left = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
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
            self.left += 1
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def app() -> App:
    return App()


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    """An impatient server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatewayProtocol, "head_timeout", PATIENCE)
        with serving(app, "uvicorn-run") as port:
            yield port


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
    connection.settimeout(PATIENCE / 20)
    with contextlib.suppress(OSError):
        for byte in data:
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                return connection.recv(65536)
    raise AssertionError("the server took all of it")


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    assert b"x-request-id: " in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_silence(port: int) -> None:
    with connection_to(port) as connection:
        assert rest_of(connection) == b""


def test_a_head_that_dribbles(port: int) -> None:
    with connection_to(port) as connection:
        assert error_of(dribble(connection, GET[:-1] + b"x" * 1000)) == (408, "request_timeout")


def test_half_a_head(port: int) -> None:
    with connection_to(port) as connection:
        connection.sendall(GET[:-4])
        assert error_of(rest_of(connection)) == (408, "request_timeout")


def test_the_second_head_dribbles(port: int) -> None:
    with connection_to(port) as connection:
        connection.sendall(GET)
        answered(connection)
        assert error_of(dribble(connection, GET[:-1] + b"x" * 1000)) == (408, "request_timeout")


def test_line_ends_for_ever(port: int) -> None:
    """They may come before a request, and are no head yet."""
    with connection_to(port) as connection:
        assert error_of(dribble(connection, b"\r\n" * 500)) == (408, "request_timeout")


def test_a_body_that_nobody_wants_dribbles(port: int) -> None:
    with connection_to(port) as connection:
        connection.sendall(POST.replace(b"/", b"/early", 1) + b"Content-Length: 1000\r\n\r\n")
        answered(connection)
        assert dribble(connection, b"x" * 1000) == b""


def test_between_requests_there_is_more_time(port: int) -> None:
    with connection_to(port) as connection:
        for _ in range(2):
            connection.sendall(GET)
            answered(connection)
            time.sleep(2 * PATIENCE)  # the limit must be over; later is as good
        connection.sendall(GET)
        answered(connection)


def test_a_slow_body_and_a_slow_answer_are_not_its_business(port: int) -> None:
    with connection_to(port) as connection:
        connection.sendall(POST + b"Content-Length: 2\r\n\r\nx")
        time.sleep(2 * PATIENCE)
        connection.sendall(b"y")
        answered(connection)
        connection.sendall(GET.replace(b"/", b"/slow", 1))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.settimeout(2 * PATIENCE)
        with pytest.raises(TimeoutError):
            rest_of(connection)


def test_a_websocket_lasts(port: int) -> None:
    with connect(f"ws://127.0.0.1:{port}/", proxy=None) as client:
        for _ in range(3):
            client.send("x")
            assert client.recv(DEADLINE) == "x"
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
    with connection_to(port) as connection:
        connection.sendall(first + second if pieces == 1 else first)
        if pieces == 2:
            eventually(lambda: app.headers and b"transfer-encoding" in app.headers[-1], "the app runs")
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
    before = app.left
    with connection_to(port) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1) + GET * behind)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    eventually(lambda: app.left == before + 1, "it knows")


def test_few_requests_may_wait_behind_another(port: int, app: App) -> None:
    with connection_to(port) as connection:
        connection.sendall(GET * GatewayProtocol.max_pipelined)
        received = b""
        while received.count(b"\r\n\r\nok") < GatewayProtocol.max_pipelined:
            received += connection.recv(65536)
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
