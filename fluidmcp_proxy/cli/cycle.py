"""One request and its answer, as uvicorn's HTTP protocol has them: what the app receives and sends, by ASGI.

uvicorn's own cycle does the same for any app, and takes half as long again. It writes head and body one by one, and a
system call less is a tenth of what a small request costs; here the head waits for what follows at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

if TYPE_CHECKING:
    import asyncio

__all__ = ["Connection", "Cycle", "writer_of"]

Message = MutableMapping[str, Any]

logger = logging.getLogger("uvicorn.error")

_FRAMING = frozenset({b"content-length", b"connection"})
_WITHOUT_BODY = frozenset({204, 304})
# What would break the lines of a head, or what no reader should meet in them (RFC 9110 §5.5).
_CONTROLS = bytes({*range(32), 127} - set(b"\t\r\n"))


class Connection(Protocol):
    """Over which a request came."""

    transport: asyncio.Transport
    flow: FlowControl
    loop: asyncio.AbstractEventLoop

    def on_response_complete(self) -> None:
        """The answer has been written."""


class Cycle:
    """See the module. uvicorn knows some of its attributes by name."""

    __slots__ = (
        "_connection",
        "_event",
        "_expects_continue",
        "_flow",
        "_head",
        "_is_bodyless",
        "_left",
        "_news",
        "_pieces",
        "_size",
        "_transport",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
        "response_started",
        "scope",
    )

    def __init__(self, connection: Connection, scope: Message, *, keep_alive: bool, expects_continue: bool) -> None:
        self.scope = scope
        self._connection = connection
        self._transport = connection.transport
        self._flow = connection.flow
        self._event: anyio.Event | None = None
        self._news = False
        self._pieces: list[bytes] = []
        self._size = 0
        self._expects_continue = expects_continue
        self._is_bodyless = scope["method"] == "HEAD"
        self._head = b""
        self._left: int | None = None  # of the answer's content-length; None: it is chunked
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False

    # The parser's side.

    def feed(self, piece: bytes) -> None:
        """A piece of the request's body has come."""
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > HIGH_WATER_LIMIT:
            self._flow.pause_reading()
        self.tell()

    def tell(self) -> None:
        """There is something to receive."""
        self._news = True
        event, self._event = self._event, None
        if event is not None:
            event.set()

    def disconnect(self) -> None:
        """The client has left."""
        self.disconnected = not self.response_complete
        self.tell()

    # The app's side.

    async def run_asgi(self, app: Any) -> None:
        """Have ``app`` answer. An answer that it leaves unfinished is cut."""
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            logger.error("Exception in ASGI application\n", exc_info=error)
        else:
            if not self.response_complete and not self.disconnected:
                logger.error("ASGI callable returned without completing response.")
        if not self.response_started and not self.disconnected:
            await self._apologise()
        elif not self.response_complete:
            self._close()

    async def receive(self) -> Message:
        """ASGI."""
        if self._expects_continue and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_continue = False
        if not self.disconnected and not self.response_complete:
            self._flow.resume_reading()
        while not (self._news or self.disconnected or self.response_complete):
            if self._event is None:
                self._event = anyio.Event()
            await self._event.wait()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces, self._size, self._news = [], 0, False
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """ASGI."""
        if self._flow.write_paused and not self.disconnected:
            await self._flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            self._begin(message)
        elif not self.response_complete:
            self._go_on(message)
        else:
            raise RuntimeError(f"{message['type']!r} was sent after the end of the answer")

    def write(self, piece: bytes) -> bool:
        """A piece of a chunked body that has begun, as by ``send``; false if that would wait, and nothing is written.

        See ``writer_of``.
        """
        if self._flow.write_paused or self.disconnected or self._head:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    def _begin(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            raise RuntimeError(f"an answer begins with http.response.start, not with {message['type']!r}")
        self.response_started, self._expects_continue = True, False
        status = message["status"]
        fields = list(message.get("headers", ()))
        self._is_bodyless = self._is_bodyless or status in _WITHOUT_BODY
        says_close = False
        for name, value in fields:
            if name not in _FRAMING:
                continue
            if name == b"content-length":
                self._left = int(value)
            elif b"close" in [token.strip() for token in value.lower().split(b",")]:
                says_close = True
        if says_close:
            self.keep_alive = False
        elif not self.keep_alive:
            fields.append((b"connection", b"close"))
        if self._left is None and not self._is_bodyless:
            fields.append((b"transfer-encoding", b"chunked"))
        self._head = STATUS_LINE[status] + _block(fields)
        self._connection.loop.call_soon(self._flush)

    @property
    def is_chunked(self) -> bool:
        """Whether more of a chunked body may follow."""
        begun = self.response_started and not self.response_complete
        return begun and self._left is None and not self._is_bodyless

    def _go_on(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            raise RuntimeError(f"an answer goes on with http.response.body, not with {message['type']!r}")
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._is_bodyless:
            body = b""
        elif self._left is None:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        else:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the answer is not as long as its content-length")
        if self._head:
            body, self._head = self._head + body, b""
        if body:
            self._transport.write(body)
        if not more:
            self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        self.tell()
        if not self.keep_alive:
            self._transport.close()
        self._connection.on_response_complete()

    async def _apologise(self) -> None:
        fields = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"21"),
            (b"connection", b"close"),
        ]
        await self.send({"type": "http.response.start", "status": 500, "headers": fields})
        await self.send({"type": "http.response.body", "body": b"Internal Server Error"})

    def _flush(self) -> None:
        """The turn of the event loop is over in which the head might have found company."""
        head, self._head = self._head, b""
        if head and not self.disconnected:
            self._transport.write(head)

    def _close(self) -> None:
        self._flush()
        self._transport.close()


def writer_of(send: object) -> Callable[[bytes], bool] | None:
    """The extension ``fluidmcp.write``: what writes a piece of the answer at once, without a task to await it.

    ``send`` is the one that the app was called with. Whoever stands in between has put another in its place, and must
    not be passed by: None, and so for an answer that is not chunked, or has not begun.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, Cycle) or send != cycle.send or not cycle.is_chunked:
        return None
    return cycle.write


def _block(fields: list[tuple[bytes, bytes]]) -> bytes:
    """Headers and the empty line after them, as they go over the wire."""
    lines = b"\r\n".join([*map(b": ".join, fields), b"\r\n"])
    ends = len(fields) + 1
    if lines.count(b"\r") != ends or lines.count(b"\n") != ends or len(lines.translate(None, _CONTROLS)) != len(lines):
        raise RuntimeError("a header of the answer has a line break or a control character")
    return lines
