"""uvicorn's HTTP protocol for ``fluidmcp run``: limits on what it waits for, and fewer writes.

The head of a request has to come in time and may not be large: uvicorn would wait, and collect, for ever. The head of
an answer and what follows at once leave together: uvicorn writes them one by one, and a system call less is a tenth of
what a small request costs.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fluidmcp_proxy.errors import GatewayError, HeadersTooLarge, InvalidTarget, RequestTimeout
from fluidmcp_proxy.upstream.headers import pick_request_id

__all__ = ["GatewayProtocol"]


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's, with limits, over a transport that gathers.

    A connection on which nobody waits for an answer is closed ``head_timeout`` seconds after it was opened, or after
    the first byte of what should become the next request, unless a head is complete by then. More than ``max_head``
    bytes that are no content end it, too: of a head, of trailers, of chunk extensions. Between requests it is
    uvicorn's keep-alive that counts, inside a body the gateway's own ``body_timeout``. At most ``max_pipelined``
    requests may wait behind one that is being answered.
    """

    head_timeout = 60.0
    max_head = 128 * 1024
    max_pipelined = 16

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self._clock: Any = None
        self._barren = 0
        self._overtaken: list[Any] = []

    # The event loop's side.

    def connection_made(self, transport: Any) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self.transport = _GatheringTransport(transport, self.loop)  # type: ignore[assignment]
        self._clock = self.loop.call_later(self.head_timeout, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._stop_clock()
        super().connection_lost(exc)
        for cycle in self._overtaken:  # uvicorn tells the last request only
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._barren += len(data)
        super().data_received(data)
        if self._barren > self.max_head:
            self._refuse(HeadersTooLarge(f"More than {self.max_head} bytes came without content."))
        elif self._clock is None and self._waits_for_a_head():
            self._clock = self.loop.call_later(self.head_timeout, self._head_is_late)

    # The parser's side.

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._barren = 0
        self._stop_clock()
        # uvicorn adds trailers to self.headers, perhaps before the app has run: no headers for it (RFC 9110 §6.5.1).
        self.scope["headers"] = [*self.headers]
        last = self.cycle
        super().on_headers_complete()
        if last is self.cycle:
            return  # a WebSocket's handshake
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser takes whatever follows for the other protocol
        if self.pipeline:
            self._overtaken = [cycle for cycle in (*self._overtaken, last) if not cycle.response_complete]
            if len(self.pipeline) > self.max_pipelined:
                raise ValueError("too many requests at once")  # the parser stops, and calls it nonsense

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._barren = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._barren = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP/1.1; called by uvicorn."""
        self._refuse(InvalidTarget("The request is not well-formed HTTP/1.1."))

    # Ours.

    def _waits_for_a_head(self) -> bool:
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        return not self.transport.is_closing() and self.transport.get_protocol() is self  # else it is a WebSocket's

    def _head_is_late(self) -> None:
        self._clock = None
        if self._barren:
            self._refuse(RequestTimeout(f"The head of the request did not come within {self.head_timeout:g} s."))
        else:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _refuse(self, error: GatewayError) -> None:
        """Answer with ``error`` and close; an answer that has begun to an earlier request is aborted instead."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self.transport.abort()
            return
        body = error.body()
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", pick_request_id(())),
        ]
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        phrase = HTTPStatus(error.status).phrase.encode()
        self.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (error.status, phrase, head, body))
        self.transport.close()


class _GatheringTransport:
    """A transport that holds the head of an answer back until the next write, at most for a turn of the event loop."""

    __slots__ = ("_head", "_loop", "_transport", "is_closing")

    def __init__(self, transport: Any, loop: Any) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self.is_closing = transport.is_closing  # asked for with every request; __getattr__ is slow

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)
