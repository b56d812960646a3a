"""One HTTP/1.1 connection to a model's server: bytes in and out, one exchange at a time, flow control both ways.

It parses and buffers, and knows when it may be used again. Which request goes over which connection is decided in
``transport``.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamInvalidResponse, UpstreamTimeout

__all__ = ["Connection"]

# As nginx's and Go's defaults are smaller still; a server that sends more is broken or hostile.
_MAX_HEAD = 64 * 1024
# Received and not yet taken: above this the server is paused.
_HIGH_WATER = 64 * 1024

_SPECIAL = frozenset({b"content-length", b"transfer-encoding", b"keep-alive"})


class Connection(asyncio.Protocol):
    """See the module. The public attributes are for ``transport``, to read.

    ``parts`` is what has arrived of the body and was not taken yet. ``usable`` turns false, for good, as soon as
    anything happened after which the next response could be mistaken.
    """

    __slots__ = (
        "_buffered",
        "_drained",
        "_fields_size",
        "_head_only",
        "_head_size",
        "_interim",
        "_loop",
        "_on_gone",
        "_parser",
        "_paused",
        "_poll",
        "_timer",
        "_transport",
        "_until_eof",
        "_uploading",
        "_waiter",
        "busy",
        "complete",
        "error",
        "head_done",
        "headers",
        "idle_since",
        "keep_alive",
        "on_body",
        "parts",
        "reason",
        "status",
        "usable",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_gone: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._on_gone = on_gone
        self.usable = True
        self.busy = False
        self.idle_since = 0.0
        self.keep_alive: float | None = None  # what the server says, in seconds
        self.parts: list[bytes] = []
        # The parser appends to the list itself: no Python frame for a chunk.
        self.on_body = self.parts.append
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._poll = select.poll()
        self._reset(head_only=False)

    def _reset(self, *, head_only: bool) -> None:
        self.parts.clear()
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.reason = b""
        self.head_done = self.complete = False
        self.error: BaseException | None = None
        self._head_only = head_only
        self._head_size = self._fields_size = self._buffered = 0
        self._interim = self._until_eof = self._paused = self._uploading = False

    def __repr__(self) -> str:
        state = "busy" if self.busy else "idle" if self.usable else "closed"
        return f"<Connection {state}>"

    # The exchange's side.

    def is_reusable(self) -> bool:
        """Whether nothing came while it was idle; asks the kernel, for the event loop may have had no turn."""
        return self.usable and not self._poll.poll(0)

    def begin(self, head_only: bool) -> None:
        """Start an exchange; ``head_only`` if the answer has no body (HEAD)."""
        self._reset(head_only=head_only)
        self.busy = True

    def finish(self) -> bool:
        """End the exchange; true if the connection may serve another one, else it is closed."""
        self.busy = False
        self.disarm()
        if self.usable and self.complete and not self._uploading and not self._transport.is_closing():
            self._resume()
            self.parts.clear()
            self.idle_since = self._loop.time()
            return True
        self.close()
        return False

    def close(self) -> None:
        """Close at once; whatever is still to be sent is dropped."""
        self.usable = False
        self._transport.abort()

    def fail(self, error: BaseException) -> None:
        """End the exchange with ``error``, after the bytes that have arrived; closes."""
        if self.error is None:
            self.error = error
        self.close()
        self._wake()

    async def wait(self) -> None:
        """Wait until the head, more of the body, the end or an error is there."""
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def arm(self, seconds: float | None) -> None:
        """Limit the time until ``disarm``."""
        if seconds is not None:
            self.disarm()
            self._timer = self._loop.call_later(seconds, self._time_out)

    def disarm(self) -> None:
        """Lift the limit."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take(self) -> bytes:
        """Return all that has arrived of the body, and let the server go on."""
        parts = self.parts
        chunk = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._buffered = 0
        self._resume()
        return chunk

    def write(self, data: bytes) -> None:
        """Send; ask ``drain()`` before more than a little follows."""
        self._transport.write(data)

    def begin_upload(self) -> None:
        """The request is not at its end yet, so that the connection cannot be used again."""
        self._uploading = True

    def end_upload(self) -> None:
        """All of the request was handed over."""
        self._uploading = False

    async def drain(self) -> bool:
        """Wait until the server has taken what was written; false when it never will."""
        if self._drained is not None:
            await self._drained
        return self.usable and not self._transport.is_closing()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        parser = self._parser
        if not self.busy or self.complete or parser is None:
            self.close()  # bytes that nobody asked for
            return
        parts_before, head_before = len(self.parts), self.head_done
        try:
            parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._refuse(error)
        if self._head_only:
            self.parts.clear()
        elif len(self.parts) != parts_before:
            self._head_size = 0
            self._count(len(data))
        elif not self.complete and head_before == self.head_done:
            # A head, a trailer or a chunk extension without an end.
            self._head_size += len(data)
            if self._head_size > _MAX_HEAD:
                self._refuse(None)
        if self.head_done:
            self._wake()

    def eof_received(self) -> None:
        """Called by the event loop; returning nothing closes the connection."""
        self.usable = False
        if self.busy and self._until_eof and self.error is None:
            self.complete = True
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        self.usable = False
        if self.busy and not self.complete:
            if self._uploading and isinstance(error, OSError):
                self._salvage()
            if not self.complete:
                lost = UpstreamDisconnected("The model's server closed the connection before its answer was complete.")
                lost.__cause__ = error
                self.fail(lost)
        self._parser = None
        self.resume_writing()
        self._on_gone(self)

    def pause_writing(self) -> None:
        """Called by the event loop."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Called by the event loop."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # The parser's side.

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self.complete:
            # An answer to nothing. Its bytes must not be taken for this one's, so the parser stops here.
            self.usable = False
            raise HttpParserError("surplus")

    def on_status(self, reason: bytes) -> None:
        """Called by the parser."""
        if not self.complete:
            self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser; for trailers too, which are dropped."""
        if self.head_done:
            return
        name = name.lower()
        self._fields_size += len(name) + len(value)
        if name in _SPECIAL:
            self._note(name, value)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        parser = self._parser
        assert parser is not None
        if self.complete or self.error is not None:
            return
        status = parser.get_status_code()
        if status < 200 and status != 101:
            self._interim = True
            return
        if status == 101 or self._fields_size > _MAX_HEAD or not parser.get_http_version().startswith("1."):
            self._refuse(None)
            return
        self.disarm()
        self.status = status
        self._head_size = 0
        self.head_done = True
        if not parser.should_keep_alive():
            self.usable = False
        if self._head_only:
            # The parser cannot be told that no body follows, hence it is not used again.
            self.complete = True
            self.usable = False
        elif status not in (204, 304):
            self._until_eof = not any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._interim:
            self._interim = False
            self.headers.clear()
            self.reason = b""
        elif self.head_done:
            self.complete = True

    def _count(self, size: int) -> None:
        self._buffered += size
        if self._buffered > _HIGH_WATER and not self._paused and not self.complete:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():  # uvloop raises then
                self._transport.resume_reading()

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"transfer-encoding":
            # Any other coding would be passed on as if it were the content (RFC 9112 §6.1).
            if value.lower() != b"chunked":
                self._refuse(None)
        elif name == b"keep-alive":
            for parameter in value.split(b","):
                key, _, seconds = parameter.strip().partition(b"=")
                if key.lower() == b"timeout" and seconds.isdigit():
                    self.keep_alive = float(seconds)

    def _refuse(self, cause: Exception | None) -> None:
        self.usable = False
        if self.complete:
            return  # the answer was good; what follows it belongs to nobody
        error = UpstreamInvalidResponse("The model's server did not answer in HTTP/1.1.")
        error.__cause__ = cause
        self.fail(error)

    def _time_out(self) -> None:
        self._timer = None
        self.fail(UpstreamTimeout("The model's server did not answer in time."))

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _salvage(self) -> None:
        """Read the answer of a server that refused the upload and hung up: sending failed, its words are still here."""
        if self._transport.get_extra_info("sslcontext") is not None:
            return
        fd = self._transport.get_extra_info("socket").fileno()
        try:
            while not self.complete and self._buffered <= _HIGH_WATER:
                data = os.read(fd, _HIGH_WATER)
                if not data:
                    self.eof_received()
                    return
                self.data_received(data)
        except OSError:
            pass  # no more there
