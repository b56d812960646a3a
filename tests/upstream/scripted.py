"""A server that sends exactly the bytes that a test says, when it says, and tells what it received."""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import trustme
from anyio.streams.tls import TLSListener

from fluidmcp_proxy.upstream.client import Address, Timeouts, Transport, open_transport
from fluidmcp_proxy.upstream.over_httpx import OverHttpx
from tests.serving import DEADLINE


@dataclass
class Peer:
    """The server's end of one connection."""

    stream: anyio.abc.ByteStream
    number: int
    buffer: bytes = b""

    async def receive(self) -> bytes:
        """More bytes, or b"" at the end."""
        try:
            return await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return b""

    async def head(self) -> bytes:
        """The next request's head; b"" if the client closed instead."""
        while b"\r\n\r\n" not in self.buffer:
            data = await self.receive()
            if not data:
                return b""
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    async def body(self, size: int) -> bytes:
        """The next ``size`` bytes; a client that leaves before ends the script."""
        while len(self.buffer) < size:
            data = await self.receive()
            if not data:
                raise anyio.EndOfStream
            self.buffer += data
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return body

    async def skip(self, size: int) -> None:
        """Read a body of ``size`` bytes and forget it."""
        size -= len(self.buffer)
        self.buffer = b""
        while size:
            data = await self.receive()
            if not data:
                raise anyio.EndOfStream
            size -= len(data)

    async def until(self, end: bytes) -> bytes:
        while not self.buffer.endswith(end):
            data = await self.receive()
            if not data:
                raise anyio.EndOfStream
            self.buffer += data
        body, self.buffer = self.buffer, b""
        return body

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def gone(self) -> None:
        """Wait until the client has closed."""
        while await self.receive():
            pass

    def stop_reading(self) -> None:
        """Until the next ``receive``; anyio reads ahead before its first one. On asyncio."""
        self.stream._transport.pause_reading()  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        raw: socket.socket = self.stream.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        transport = getattr(self.stream, "_transport", None)
        if transport is not None:
            transport.abort()  # anyio's lowest version says FIN first when it closes


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class Server:
    address: Address
    connections: int = 0
    errors: list[BaseException] = field(default_factory=list)


@functools.cache
def authority() -> trustme.CA:
    """Whoever signs for ``localhost``."""
    return trustme.CA()


@asynccontextmanager
async def serve(script: Script, *, tls: bool = False) -> AsyncIterator[Server]:
    """Run ``script`` for every connection; leaving closes them all."""
    listener: Any = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    address = Address("https" if tls else "http", "localhost" if tls else "127.0.0.1", port)
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority().issue_cert("localhost").configure_cert(context)
        listener = TLSListener(listener, context, standard_compatible=False)
    server = Server(address)

    async def handle(stream: anyio.abc.ByteStream) -> None:
        server.connections += 1
        async with stream:
            try:
                await script(Peer(stream, server.connections))
            except (anyio.BrokenResourceError, anyio.EndOfStream):
                pass  # the client left, which is what some tests are about

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        with anyio.fail_after(DEADLINE):
            yield server
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def connect(
    server: Server | Address, wire: str, timeouts: Timeouts | None = None, **options: Any
) -> AsyncIterator[Transport]:
    """The transport under test."""
    address = server.address if isinstance(server, Server) else server
    timeouts = timeouts or Timeouts(connect=DEADLINE)
    if wire == "httpx":
        transport: Transport = OverHttpx(address, timeouts, **options)
    else:
        transport = open_transport(address, timeouts, **options)
    try:
        yield transport
    finally:
        with anyio.CancelScope(shield=True):
            await transport.aclose()


@dataclass
class Answer:
    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


HOST = (b"host", b"upstream")


async def ask(
    transport: Transport,
    method: bytes = b"GET",
    target: bytes = b"/",
    headers: list[tuple[bytes, bytes]] | None = None,
    body: Any = None,
) -> Answer:
    """One whole exchange."""
    try:
        async with transport.exchange(method, target, [HOST, *(headers or [])], body) as answer:
            chunks = [chunk async for chunk in answer.body]
            assert all(chunks), "an empty chunk"
            return Answer(answer.status, answer.reason, answer.headers, b"".join(chunks))
    finally:
        if hasattr(body, "aclose"):
            with anyio.CancelScope(shield=True):
                await body.aclose()


def answering(data: bytes, *, then_close: bool = False) -> Script:
    """Answer every request without a body with ``data``."""

    async def script(peer: Peer) -> None:
        while await peer.head():
            await peer.send(data)
            if then_close:
                return

    return script


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
