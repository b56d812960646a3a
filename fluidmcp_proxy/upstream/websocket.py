"""The client side of one WebSocket to a model's server: messages both ways, flow control both ways, on asyncio.

The protocol itself (RFC 6455) is the ``websockets`` package's, without its I/O. Opening the connection is up to
``transport``.

No extension is offered, so nothing is compressed on this hop: both ends are near, and audio does not shrink. A message
is held whole, since ASGI knows no fragments; its size has the limit that the caller sets. This side pings a server that
has been silent for ``PING_AFTER`` seconds, so that what lies between the two does not forget the connection, and takes
it for dead only after ``PATIENCE``: a model's server answers no ping while it is busy with its own work.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from fluidmcp_proxy.errors import UpstreamInvalidResponse, UpstreamTimeout
from fluidmcp_proxy.upstream.endings import can_be_sent, ending_of, fit_reason, lost, pairs_of
from fluidmcp_proxy.upstream.flow_control import HIGH_WATER, FlowControl
from fluidmcp_proxy.upstream.framing import encode_head

if TYPE_CHECKING:
    from fluidmcp_proxy.upstream.client import Headers

__all__ = ["WebSocket"]

PING_AFTER = 20.0
PATIENCE = 300.0

# A message that is not taken counts as a little more than its bytes.
_OVERHEAD = 64
# How long a message waits for a server that does not read: its client is not heard meanwhile.
_HOLD = 0.25
# How long the server may take to answer that its client has left.
_CLOSE_TIMEOUT = 0.8
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch


class _Discreet(logging.LoggerAdapter[logging.Logger]):
    """A logger that is never asked for DEBUG, where ``websockets`` writes headers and messages."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's own name
        return level > logging.DEBUG and super().isEnabledFor(level)


_logger = _Discreet(logging.getLogger("fluidmcp_proxy.upstream"), {})


class WebSocket(FlowControl):
    """One connection; ``receive()`` is for one task, ``send()`` for one other.

    ``headers`` are those of the server's 101, ``subprotocol`` the one that it chose, ``bytes_received`` the size of all
    messages taken so far. Names that are no tokens (RFC 6455 §4.1) are not offered as subprotocols.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_gone: Callable[[WebSocket], None],
        subprotocols: Sequence[str],
        max_message: int,
    ) -> None:
        super().__init__(loop)
        self._on_gone = on_gone
        self._max_message = max_message
        offered = [Subprotocol(name) for name in subprotocols if _TOKEN(name)] or None
        # Where it is connected to, and under which names, is not this object's business.
        uri = WebSocketURI(False, "", 80, "/", "")
        self._wire = ClientProtocol(uri, subprotocols=offered, max_size=max_message, logger=_logger)
        self._response: Response | None = None
        self._messages: deque[tuple[str | bytes, int]] = deque()  # each with its size
        self._fragments: list[bytes] = []
        self._is_text = False
        self._leaving = False
        self._end: Exception | None = None
        self._gone = anyio.Event()
        self._heard = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.bytes_received = 0
        self.headers: list[tuple[bytes, bytes]] = []

    def __repr__(self) -> str:
        return f"<WebSocket {'open' if self.is_open() else 'closed'}>"

    @property
    def subprotocol(self) -> str | None:
        """The one that the server chose among those that were offered."""
        return self._wire.subprotocol

    def is_open(self) -> bool:
        """Whether neither side has ended it, as far as is known."""
        return self._end is None and not self._transport.is_closing()

    # The relay's side.

    async def shake_hands(self, target: bytes, headers: Headers, limit: float | None) -> None:
        """Ask for the upgrade, and wait for the answer for ``limit`` seconds.

        Raises:
            HandshakeRefused: the server does not want to.
            UpstreamDisconnected: it closed the connection instead.
            UpstreamInvalidResponse: it neither agreed nor refused in HTTP/1.1.
            UpstreamTimeout: it did not answer in time.
            InvalidTarget: the request cannot be written as HTTP/1.1.
        """
        ours = [
            (name.lower().encode("ascii"), value.encode("ascii"))
            for name, value in self._wire.connect().headers.raw_items()
            if name != "Host"
        ]
        self._transport.write(encode_head(b"GET", target, [*headers, *ours]))
        self._watch_until(limit)
        while self._response is None and self._end is None:
            await self.wait()
        if self._response is None or self._wire.handshake_exc is not None:
            assert self._end is not None
            raise self._end
        self.headers = pairs_of(self._response)
        self._heard = self._loop.time()
        self._keep_alive()

    async def receive(self) -> str | bytes:
        """The next message.

        Raises:
            WebSocketClosed: the server has closed the connection, after all its messages.
            UpstreamDisconnected: the connection was lost.
            UpstreamInvalidResponse: what came breaks the protocol, is no UTF-8, or is too large.
            UpstreamTimeout: nothing came for ``PATIENCE`` seconds, not even the answer to a ping.
        """
        while not self._messages:
            if self._end is not None:
                raise self._end
            await self.wait()
        message, size = self._messages.popleft()
        self.bytes_received += size
        self._buffered -= size + _OVERHEAD
        if self._paused and self._buffered <= HIGH_WATER:
            self._heard = self._loop.time()  # until now its silence was ours
            self._resume()
        return message

    async def send(self, message: str | bytes) -> None:
        """Send a message as soon as the server has taken those before; dropped when the connection has ended.

        It waits before and not after, and not for long, so that the caller hears its client leave while the server does
        not read. What that lets pile up, a few messages a second, is at most what one message may have.
        """
        if self._drained is not None:
            full = self._transport.get_write_buffer_size() > self._max_message
            await asyncio.wait((self._drained,), timeout=None if full else _HOLD)
        if not self.is_open():
            return  # receive() tells why
        if isinstance(message, str):
            self._wire.send_text(message.encode())
        else:
            self._wire.send_binary(message)
        self._flush()

    async def close(self, code: int, reason: str = "") -> None:
        """Close in good form, with no code if ``code`` cannot be sent; returns within a second, also if cancelled."""
        if not self.is_open():
            return
        self._leaving = True
        if can_be_sent(code):
            self._wire.send_close(code, fit_reason(reason))
        else:
            self._wire.send_close()
        self._flush()
        self._resume()
        with anyio.move_on_after(_CLOSE_TIMEOUT, shield=True):
            await self._gone.wait()
        self._transport.abort()

    def leave(self) -> None:
        """Let go of the connection at once; a server that is still there is told that this end goes away."""
        if self.is_open() and self._wire.state is State.OPEN:
            self._wire.send_close(1001)
            self._flush()
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    def fail(self, error: Exception) -> None:
        """End the connection with ``error``, after the messages that have arrived."""
        self._over(error)
        self._transport.abort()

    # The event loop's side.

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._heard = self._loop.time()
        self._wire.receive_data(data)
        self._flush()
        self._digest()

    def eof_received(self) -> None:
        """Called by the event loop; returning nothing closes the connection."""
        self._wire.receive_eof()
        self._digest()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        self._wire.receive_eof()
        self._digest()
        self._over(lost(error))
        self._gone.set()
        self.resume_writing()
        if self._timer is not None:
            self._timer.cancel()
        self._on_gone(self)

    # Between the two.

    def _digest(self) -> None:
        """Take in what the wire has made of the bytes."""
        for event in self._wire.events_received():
            if isinstance(event, Response):
                self._response = event
            elif isinstance(event, Frame) and self._end is None and not self._leaving:
                self._take(event)
        if (end := ending_of(self._wire, self._response)) is not None:
            self._over(end)
        elif self._messages and self._buffered > HIGH_WATER and not self._leaving:
            self._pause()
        self._wake()

    def _take(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return  # the wire has answered a ping, and knows of a close
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        self._fragments.append(bytes(frame.data))
        if not frame.fin:
            return
        data = self._fragments[0] if len(self._fragments) == 1 else b"".join(self._fragments)
        self._fragments.clear()
        try:
            self._messages.append((data.decode() if self._is_text else data, len(data)))
            self._buffered += len(data) + _OVERHEAD
        except UnicodeDecodeError as error:
            self._wire.fail(1007)
            self._flush()
            end = UpstreamInvalidResponse("What the model's server sent is no UTF-8.")
            end.__cause__ = error
            self._over(end)

    def _over(self, end: Exception) -> None:
        if self._end is None:
            self._end = end
            self._wake()

    def _flush(self) -> None:
        if self._transport.is_closing():
            self._wire.data_to_send()
            return
        for data in self._wire.data_to_send():
            if data:
                self._transport.write(data)

    def _watch_until(self, limit: float | None) -> None:
        if limit is not None:
            late = UpstreamTimeout("The model's server did not answer in time.")
            self._timer = self._loop.call_later(limit, self.fail, late)

    def _keep_alive(self) -> None:
        """Called every ``PING_AFTER`` seconds. While the server is paused its silence is ours."""
        if self._timer is not None:
            self._timer.cancel()
        silence = 0.0 if self._paused else self._loop.time() - self._heard
        if silence >= PATIENCE:
            self.fail(UpstreamTimeout("The model's server has been silent for too long."))
            return
        if silence >= PING_AFTER and self._drained is None and self._wire.state is State.OPEN:
            self._wire.send_ping(b"")
            self._flush()
        if self.is_open():
            self._timer = self._loop.call_later(PING_AFTER, self._keep_alive)
