"""The connections to one model's server, on asyncio: a pool without limits, and the exchange over one of them.

The protocol itself is in ``connection``. No task is made for a request unless its body is streamed.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import anyio

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamUnavailable
from fluidmcp_proxy.upstream.connection import Connection, Sink
from fluidmcp_proxy.upstream.framing import Framing, encode_head, frame
from fluidmcp_proxy.upstream.websocket import WebSocket

if TYPE_CHECKING:
    from fluidmcp_proxy.upstream.client import Address, Body, Headers, Timeouts

__all__ = ["AsyncioTransport", "is_asyncio"]

# A body up to this size leaves with its head in one write.
_ONE_WRITE = 256 * 1024
_SLICE = 64 * 1024


def is_asyncio() -> bool:
    """Whether the caller runs in an asyncio task; false on trio, also as asyncio's guest."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


class AsyncioTransport:
    """See ``client.Transport``. ``opened`` and ``reused`` count connections and their second uses."""

    def __init__(self, address: Address, timeouts: Timeouts, *, keep_alive: float = 4.0) -> None:
        self._address = address
        self._timeouts = timeouts
        self._keep_alive = keep_alive
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[Connection] = []  # the one used last is last
        self._all: set[Connection | WebSocket] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        self._closed = False
        self.opened = 0
        self.reused = 0

    def __repr__(self) -> str:
        return f"<AsyncioTransport {self._address.url}, {len(self._all)} connections, {len(self._idle)} of them idle>"

    def exchange(self, method: bytes, target: bytes, headers: Headers, body: Body = None) -> _Exchange:
        """See ``Transport.exchange``."""
        framing = frame(method, target, headers, body)
        return _Exchange(self, encode_head(method, target, framing.headers), framing, method == b"HEAD")

    @asynccontextmanager
    async def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AsyncIterator[WebSocket]:
        """See ``Transport.open_websocket``."""
        self._settle()
        socket = WebSocket(asyncio.get_running_loop(), self._all.discard, subprotocols, max_message)
        await self._reach(socket)
        try:
            await socket.shake_hands(target, headers, self._timeouts.first_byte)
            yield socket
        finally:
            socket.leave()

    async def aclose(self) -> None:
        """Close every connection; exchanges under way end with ``UpstreamDisconnected``."""
        self._closed = True
        if self._loop is not asyncio.get_running_loop():
            return  # unused, or its event loop took the sockets along
        self._stop_sweep()
        self._idle.clear()
        for connection in list(self._all):
            connection.fail(UpstreamDisconnected("The gateway closed the connection to the model's server."))
        await asyncio.sleep(0)  # the event loop lets go of the sockets

    # For the exchange.

    @property
    def timeouts(self) -> Timeouts:
        """The limits of every exchange."""
        return self._timeouts

    def take_idle(self) -> Connection | None:
        """Return the connection used last, if it is surely still open at the other end."""
        loop = self._settle()
        while self._idle:
            connection = self._idle.pop()
            if self._expires(connection) > loop.time() and connection.is_reusable():
                self.reused += 1
                return connection
            connection.close()
        return None

    def put_idle(self, connection: Connection) -> None:
        """Keep ``connection`` for the next request."""
        if self._closed:
            connection.close()
            return
        self._idle.append(connection)
        if self._sweep is None and self._loop is not None:
            self._sweep = self._loop.call_later(self._keep_alive, self._close_expired)

    async def connect(self) -> Connection:
        """Open a connection."""
        connection = Connection(asyncio.get_running_loop(), self._forget)
        await self._reach(connection)
        return connection

    async def _reach(self, connection: Connection | WebSocket) -> None:
        if self._closed:
            raise UpstreamUnavailable("The connections to the model's server are closed.")
        try:
            async with asyncio.timeout(self._timeouts.connect):
                await self._dial(connection)
        except (OSError, UnicodeError) as error:  # TimeoutError and ssl.SSLError are OSErrors
            raise UpstreamUnavailable("The model's server cannot be reached.") from error
        self.opened += 1
        self._keep(connection)

    def _keep(self, connection: Connection | WebSocket) -> None:
        if self._closed:  # meanwhile, and nobody else would close this one
            error = UpstreamUnavailable("The connections to the model's server are closed.")
            connection.fail(error)
            raise error
        if not connection.is_open():
            # Nothing of the request has left, so this is still a connect that failed.
            raise UpstreamUnavailable("The model's server closed the connection at once.")
        self._all.add(connection)

    async def _dial(self, connection: Connection | WebSocket) -> None:
        loop, address = asyncio.get_running_loop(), self._address
        tls = self._tls_context() if address.scheme == "https" else None
        name = address.host if tls is not None else None
        if address.uds is not None:
            await loop.create_unix_connection(lambda: connection, address.uds, ssl=tls, server_hostname=name)
        else:
            await loop.create_connection(lambda: connection, address.host, address.port, ssl=tls, server_hostname=name)

    def _settle(self) -> asyncio.AbstractEventLoop:
        """The running event loop; on another one than before nothing is kept, since it made its sockets itself."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._sweep = loop, None
            self._idle.clear()
            self._all.clear()
        return loop

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    def _forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _expires(self, connection: Connection) -> float:
        limit = self._keep_alive
        said = connection.answer.keep_alive
        if said is not None:
            limit = min(limit, said - 1.0)  # a second for what is under way
        return connection.idle_since + limit

    def _close_expired(self) -> None:
        self._sweep = None
        assert self._loop is not None
        now = self._loop.time()
        expired = [connection for connection in self._idle if self._expires(connection) <= now]
        self._idle = [connection for connection in self._idle if self._expires(connection) > now]
        for connection in expired:
            connection.close()
        if self._idle:
            first = min(map(self._expires, self._idle))
            self._sweep = self._loop.call_at(first, self._close_expired)

    def _stop_sweep(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None


class _Exchange:
    """The context of one exchange, its ``Response``, and the iterator of that one's body."""

    __slots__ = (
        "_connection",
        "_framing",
        "_head",
        "_head_only",
        "_transport",
        "_upload",
        "headers",
        "reason",
        "status",
    )

    def __init__(self, transport: AsyncioTransport, head: bytes, framing: Framing, head_only: bool) -> None:
        self._transport = transport
        self._head = head
        self._framing = framing
        self._head_only = head_only
        self._connection: Connection | None = None
        self._upload: asyncio.Task[None] | None = None
        self.status = 0
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def body(self) -> AsyncIterator[bytes]:
        """Raw chunks as they come."""
        return self

    @property
    def ended(self) -> bool:
        """Whether all of the answer has arrived and was taken."""
        connection = self._connection
        return connection is None or (connection.answer.complete and not connection.answer.parts)

    async def __aenter__(self) -> _Exchange:
        connection = self._transport.take_idle() or await self._transport.connect()
        self._connection = connection
        answer = connection.answer
        try:
            self._send(connection)
            while not answer.head_done:
                if connection.error is not None:
                    raise connection.error
                await connection.wait()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        connection.disarm()
        self.status, self.reason, self.headers = answer.status, answer.reason, answer.headers
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.finish():
            self._transport.put_idle(connection)
        if self._upload is not None and not self._upload.done():
            self._upload.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((self._upload,))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        if connection is None:
            raise StopAsyncIteration
        answer = connection.answer
        if not answer.parts and not answer.complete and connection.error is None:
            connection.arm(self._transport.timeouts.idle)
            while not answer.parts and not answer.complete and connection.error is None:
                await connection.wait()
            connection.disarm()
        if answer.parts:
            return connection.take()
        if answer.complete:
            raise StopAsyncIteration
        assert connection.error is not None
        raise connection.error

    async def pour(self, sink: Sink) -> None:
        """See ``Response.pour``."""
        connection = self._connection
        if connection is None:
            return
        answer = connection.answer
        if not answer.parts and not answer.complete and connection.error is None:
            connection.arm(self._transport.timeouts.idle)
            await connection.pour(sink)
            connection.disarm()

    def _send(self, connection: Connection) -> None:
        body = self._framing.body
        whole = body is None or (isinstance(body, bytes) and len(body) <= _ONE_WRITE)
        connection.begin(head_only=self._head_only, uploading=not whole)
        if whole:
            connection.write(self._head + body if isinstance(body, bytes) else self._head)
            connection.arm(self._transport.timeouts.first_byte)
        else:
            connection.write(self._head)
            self._upload = asyncio.create_task(self._stream_up(connection))

    async def _stream_up(self, connection: Connection) -> None:
        try:
            if await self._write_pieces(connection):
                connection.end_upload()
                if not connection.answer.head_done:
                    connection.arm(self._transport.timeouts.first_byte)
        except Exception as error:
            # Whatever the caller's own iterator raised is raised to the caller again.
            connection.fail(error)
        except BaseException:
            connection.close()
            raise

    async def _write_pieces(self, connection: Connection) -> bool:
        framing = self._framing
        async for piece in _pieces(framing.body):
            framing.count(len(piece))
            if framing.chunked:
                if not piece:
                    continue  # it would be the last chunk
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            connection.write(piece)
            if not await connection.drain():
                return False
        framing.finish()
        if framing.chunked:
            connection.write(b"0\r\n\r\n")
        return True


def _pieces(body: Body) -> AsyncIterator[bytes]:
    return _sliced(body) if isinstance(body, bytes) else body or _sliced(b"")


async def _sliced(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _SLICE):
        yield body[start : start + _SLICE]
