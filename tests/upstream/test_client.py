"""Addresses, the choice of a transport, and ``httpx.AsyncClient`` in front of or behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import anyio
import httpx
import pytest

from fluidmcp_proxy.errors import (
    GatewayError,
    InvalidTarget,
    ModelFailed,
    UpstreamDisconnected,
    UpstreamInvalidResponse,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from fluidmcp_proxy.upstream.as_httpx import HttpxFace
from fluidmcp_proxy.upstream.client import Address, Timeouts, open_client, open_transport
from fluidmcp_proxy.upstream.over_httpx import OverHttpx
from fluidmcp_proxy.upstream.transport import AsyncioTransport
from tests.serving import DEADLINE

from .scripted import HOST, OK, Peer, answering, ask, connect, serve

ONE_WIRE = pytest.mark.parametrize("wire", ["raw"], indirect=True)


@pytest.mark.parametrize(
    ("address", "authority", "url"),
    [
        (Address("http", "localhost", 8001), b"localhost:8001", "http://localhost:8001"),
        (Address("http", "localhost", 80), b"localhost", "http://localhost"),
        (Address("https", "a.example", 443, "/api"), b"a.example", "https://a.example/api"),
        (Address("https", "a.example", 80), b"a.example:80", "https://a.example:80"),
        (Address("http", "::1", 8001), b"[::1]:8001", "http://[::1]:8001"),
        (Address("http", "localhost", 80, uds="/tmp/s"), b"localhost", "http://localhost"),
    ],
)
def test_address(address: Address, authority: bytes, url: str) -> None:
    assert (address.authority, address.url) == (authority, url)


@pytest.mark.anyio
async def test_the_transport_fits_the_event_loop(wire: str) -> None:
    async with serve(answering(OK)) as server, connect(server, wire) as transport:
        await ask(transport)
        kind = AsyncioTransport if wire.startswith("raw") else OverHttpx
        assert type(getattr(transport, "_chosen", transport)) is kind
        assert kind.__name__ in repr(transport)


def test_nothing_is_chosen_before_the_first_use() -> None:
    """A gateway is made where no event loop runs."""
    assert repr(open_transport(Address("http", "h", 1))) == "<transport to http://h:1, unused>"


# httpx's client over a transport of ours.


@pytest.mark.anyio
async def test_client_reaches_the_servers_v1(wire: str) -> None:
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        while head := await peer.head():
            received.append(head)
            received.append(await peer.body(13))
            body = b'{"answer": 42}'
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            await peer.send(b"content-length: %d\r\n\r\n%b" % (len(body), body))

    async with serve(script) as server:
        address = Address("http", "127.0.0.1", server.address.port, "/api")
        async with connect(address, wire) as transport:
            async with open_client(transport, address) as client:
                response = await client.post("/chat/completions?a=b%20c", json={"model": "m"}, headers={"X-A": "1"})
                assert response.json() == {"answer": 42}
                assert response.http_version == "HTTP/1.1"
            assert (await ask(transport, b"POST", body=b"x" * 13)).status == 200, (
                "closing the client closed the transport"
            )
            assert server.connections == 1
    assert received[0].startswith(b"POST /api/v1/chat/completions?a=b%20c HTTP/1.1\r\n")
    assert b"\r\nx-a: 1\r\n" in received[0]
    assert received[0].lower().count(b"\r\nhost: ") == 1
    assert json.loads(received[1]) == {"model": "m"}


@pytest.mark.anyio
async def test_client_streams_and_leaves(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n")
        await peer.gone()
        gone.set()

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        open_client(transport, server.address) as client,
    ):
        async with client.stream("GET", "/x") as response:
            async for line in response.aiter_lines():
                assert line == "data: 1"
                break
        await gone.wait()


@pytest.mark.anyio
async def test_client_sends_streams_files_and_nothing(wire: str) -> None:
    bodies: list[bytes] = []

    async def script(peer: Peer) -> None:
        while head := await peer.head():
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
            chunked = b"transfer-encoding: chunked" in head.lower()
            assert len(length) + chunked <= 1
            bodies.append(
                await (peer.until(b"0\r\n\r\n") if chunked else peer.body(int(length[0][16:]) if length else 0))
            )
            await peer.send(OK)

    async def upload() -> AsyncIterator[bytes]:
        yield b"abc"

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        open_client(transport, server.address) as client,
    ):
        await client.post("/a", content=upload())
        await client.post("/a", files={"file": ("n", b"contents")})
        await client.post("/a")
        await client.get("/a")
        await client.delete("/a")
    assert bodies[0] == b"3\r\nabc\r\n0\r\n\r\n"
    assert b"contents" in bodies[1]
    assert bodies[2:] == [b"", b"", b""]


@pytest.mark.anyio
async def test_clients_own_read_time_out(wire: str) -> None:
    async def script(peer: Peer) -> None:
        if b"/head" not in await peer.head():
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab")
        await peer.gone()

    async with (
        serve(script) as server,
        connect(server, wire) as transport,
        open_client(transport, server.address) as client,
    ):
        for path in ("/head", "/body"):
            with pytest.raises(httpx.ReadTimeout):
                await client.get(path, timeout=httpx.Timeout(DEADLINE, read=0.05))


class Failing:
    """A transport that only fails."""

    def __init__(self, error: GatewayError) -> None:
        self.error = error

    def exchange(self, *_: object) -> Failing:
        return self

    async def __aenter__(self) -> Failing:
        raise self.error

    async def __aexit__(self, *_: object) -> None:
        raise AssertionError("never entered")

    async def aclose(self) -> None:
        pass


@ONE_WIRE
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (UpstreamUnavailable("no"), httpx.ConnectError),
        (ModelFailed("no"), httpx.ConnectError),
        (UpstreamTimeout("no"), httpx.ReadTimeout),
        (UpstreamDisconnected("no"), httpx.ReadError),
        (UpstreamInvalidResponse("no"), httpx.RemoteProtocolError),
        (InvalidTarget("no"), httpx.LocalProtocolError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
async def test_client_raises_httpxs_errors(wire: str, ours: GatewayError, theirs: type[Exception]) -> None:
    async with httpx.AsyncClient(transport=HttpxFace(Failing(ours))) as client:  # type: ignore[arg-type]
        with pytest.raises(theirs, match="no") as caught:
            await client.get("http://h/")
        assert caught.value.__cause__ is ours


@pytest.mark.anyio
async def test_client_raises_httpxs_errors_inside_the_body(wire: str) -> None:
    data = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab"
    async with (
        serve(answering(data, then_close=True)) as server,
        connect(server, wire) as transport,
        open_client(transport, server.address) as client,
    ):
        with pytest.raises(httpx.ReadError):
            await client.get("/a")


@pytest.mark.anyio
async def test_client_obeys_no_proxy_variable(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serve(answering(OK)) as server, connect(server, wire) as transport:
        assert (await ask(transport)).body == b"ok"
        async with open_client(transport, server.address) as client:
            assert (await client.get("/a")).text == "ok"


# Ours over a transport of httpx's that is handed in.

HANDED_IN = pytest.mark.parametrize("wire", ["httpx", "httpx-trio"], indirect=True)
ADDRESS = Address("http", "model", 8001)


@HANDED_IN
@pytest.mark.anyio
async def test_mock_transport(wire: str) -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(201, json={"a": 1}, headers=[("x-a", "1"), ("X-A", "2")])

    transport = open_transport(ADDRESS, transport=httpx.MockTransport(answer))
    result = await ask(transport, b"POST", b"/v1/../x", [(b"x-b", b"c")], b"body")
    assert (result.status, json.loads(result.body)) == (201, {"a": 1})
    assert [value for name, value in result.headers if name == b"x-a"] == [b"1", b"2"]
    (request,) = requests
    assert (request.method, request.extensions["target"], request.content) == ("POST", b"/v1/../x", b"body")
    assert (request.headers["host"], request.headers["x-b"]) == ("upstream", "c")
    await transport.aclose()


@HANDED_IN
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (httpx.ConnectError("x"), UpstreamUnavailable),
        (httpx.ConnectTimeout("x"), UpstreamUnavailable),
        (httpx.PoolTimeout("x"), UpstreamUnavailable),
        (httpx.ReadTimeout("x"), UpstreamTimeout),
        (httpx.WriteTimeout("x"), UpstreamTimeout),
        (httpx.ReadError("x"), UpstreamDisconnected),
        (httpx.WriteError("x"), UpstreamDisconnected),
        (ConnectionResetError("x"), UpstreamDisconnected),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), UpstreamDisconnected),
        (httpx.RemoteProtocolError("illegal status line"), UpstreamInvalidResponse),
        (httpx.LocalProtocolError("x"), InvalidTarget),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("inside", [False, True], ids=["before the head", "inside the body"])
async def test_foreign_errors_become_ours(wire: str, theirs: Exception, ours: type[GatewayError], inside: bool) -> None:
    class Broken(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"ab"
            raise theirs

    class Foreign(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if not inside:
                raise theirs
            return httpx.Response(200, stream=Broken())

    transport = open_transport(ADDRESS, transport=Foreign())
    with pytest.raises(ours) as caught:
        await ask(transport)
    assert caught.value.__cause__ is theirs


@HANDED_IN
@pytest.mark.anyio
async def test_time_outs_are_told_to_a_foreign_transport(wire: str) -> None:
    seen: list[dict[str, float | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.extensions["timeout"])
        assert request.extensions["timeout"]["read"] == 7
        return httpx.Response(200, content=b"x")

    transport = open_transport(ADDRESS, Timeouts(3, 7, 9), transport=httpx.MockTransport(answer))
    async with transport.exchange(b"GET", b"/", [HOST]) as response:
        assert seen == [{"connect": 3, "read": 9, "write": None, "pool": None}]
        assert [chunk async for chunk in response.body] == [b"x"]


@HANDED_IN
@pytest.mark.anyio
async def test_leaving_closes_a_foreign_answer(wire: str) -> None:
    closed = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield b""
                yield b"x"

        async def aclose(self) -> None:
            nonlocal closed
            closed += 1

    transport = open_transport(
        ADDRESS, transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=Endless()))
    )
    async with transport.exchange(b"GET", b"/", [HOST]) as answer:
        assert await answer.body.__anext__() == b"x"
    assert closed == 1
