"""TLS: system trust, the name in the certificate, and an end that was not said."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamUnavailable
from fluidmcp_proxy.upstream.client import Address, Timeouts

from .scripted import OK, Peer, answering, ask, authority, connect, serve

pytestmark = pytest.mark.anyio


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate = tmp_path / "authority.pem"
    authority().cert_pem.write_to_path(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


@pytest.mark.usefixtures("trusted")
async def test_exchange_and_reuse(wire: str) -> None:
    async with serve(answering(OK), tls=True) as server, connect(server, wire) as transport:
        for _ in range(3):
            assert (await ask(transport)).body == b"ok"
        assert server.connections == 1


@pytest.mark.usefixtures("trusted")
async def test_large_both_ways(wire: str) -> None:
    body = bytes(range(256)) * 4096

    async def script(peer: Peer) -> None:
        await peer.head()
        assert await peer.body(len(body)) == body
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await peer.gone()  # uvloop's TLS loses bytes that it holds back when the end comes without a close_notify

    async with serve(script, tls=True) as server, connect(server, wire) as transport:
        assert (await ask(transport, b"POST", body=body)).body == body


@pytest.mark.usefixtures("trusted")
async def test_the_name_is_checked(wire: str) -> None:
    async with serve(answering(OK), tls=True) as server:
        address = Address("https", "127.0.0.1", server.address.port)
        async with connect(address, wire) as transport:
            with pytest.raises(UpstreamUnavailable):
                await ask(transport)


async def test_a_stranger_is_not_trusted(wire: str) -> None:
    async with serve(answering(OK), tls=True) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamUnavailable):
            await ask(transport)


async def test_a_server_without_tls(wire: str) -> None:
    async with serve(answering(OK)) as server:
        address = Address("https", "localhost", server.address.port)
        async with connect(address, wire, Timeouts(connect=0.3)) as transport:
            with pytest.raises(UpstreamUnavailable):
                await ask(transport)


@pytest.mark.usefixtures("trusted")
async def test_cut(wire: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab")

    async with serve(script, tls=True) as server, connect(server, wire) as transport:
        with pytest.raises(UpstreamDisconnected):
            await ask(transport)


@pytest.mark.usefixtures("trusted")
async def test_left_early(wire: str) -> None:
    gone = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab")
        await peer.gone()
        gone.set()

    async with serve(script, tls=True) as server, connect(server, wire) as transport:
        async with transport.exchange(b"GET", b"/", [(b"host", b"x")]) as answer:
            assert await answer.body.__anext__() == b"ab"
        await gone.wait()
