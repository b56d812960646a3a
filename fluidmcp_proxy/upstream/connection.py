"""One connection to a model's server: bytes in and out, one exchange at a time, flow control both ways.

What the bytes mean is decided in ``answer``, which request goes over which connection in ``transport``.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamInvalidResponse, UpstreamTimeout
from fluidmcp_proxy.upstream.answer import Answer
from fluidmcp_proxy.upstream.flow_control import HIGH_WATER, FlowControl

__all__ = ["Connection", "Sink"]

Sink = Callable[[bytes], bool]
"""Takes a piece of a body at once, or returns false."""


class Connection(FlowControl):
    """See the module. ``error`` is why the exchange cannot go on, once the bytes that arrived before are taken."""

    __slots__ = (
        "_busy",
        "_heard",
        "_limit",
        "_on_gone",
        "_poll",
        "_sink",
        "_timer",
        "_uploading",
        "answer",
        "error",
        "idle_since",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_gone: Callable[[Connection], None]) -> None:
        super().__init__(loop)
        self._on_gone = on_gone
        self._poll = select.poll()
        self._busy = self._uploading = False
        self._sink: Sink | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._limit = self._heard = 0.0
        self.answer = Answer()
        self.error: BaseException | None = None
        self.idle_since = 0.0

    def __repr__(self) -> str:
        state = "busy" if self._busy else "idle" if self.answer.clean else "closed"
        return f"<Connection {state}>"

    # The exchange's side.

    def is_open(self) -> bool:
        """Whether it has not been closed by either side, as far as is known."""
        return self.answer.clean and not self._transport.is_closing()

    def is_reusable(self) -> bool:
        """Whether nothing came while it was idle; asks the kernel, for the event loop may have had no turn."""
        return self.answer.clean and not self._poll.poll(0)

    def begin(self, *, head_only: bool, uploading: bool) -> None:
        """Start an exchange. While ``uploading``, the request is not at its end, so the connection is used up."""
        self.answer.begin(head_only=head_only)
        self.error = None
        self._buffered = 0
        self._uploading = uploading
        self._busy = True

    def finish(self) -> bool:
        """End the exchange; true if the connection may serve another one, else it is closed."""
        self._busy = False
        self.disarm()
        if self.answer.complete and not self._uploading and self.is_open():
            self.take()
            self.idle_since = self._loop.time()
            return True
        self.close()
        return False

    def close(self) -> None:
        """Close at once; whatever is still to be sent is dropped."""
        self.answer.clean = False
        self._transport.abort()

    def fail(self, error: BaseException) -> None:
        """Close, and end the exchange with ``error`` after the bytes that have arrived."""
        if self.error is None:
            self.error = error
        self.close()
        self._wake()

    async def pour(self, sink: Sink) -> None:
        """As ``wait``, but what arrives is given to ``sink`` and needs no wait to end, until it is refused.

        The last piece of an answer is never given to it.
        """
        self._sink = sink
        try:
            await self.wait()
        finally:
            self._sink = None

    def arm(self, seconds: float | None) -> None:
        """Limit the time until ``disarm``, or from one piece that is poured to the next."""
        if seconds is not None:
            self.disarm()
            self._limit, self._heard = seconds, self._loop.time()
            self._timer = self._loop.call_later(seconds, self._time_out)

    def disarm(self) -> None:
        """Lift the limit."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take(self) -> bytes:
        """Return all that has arrived of the body, and let the server go on."""
        parts = self.answer.parts
        chunk = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._buffered = 0
        self._resume()
        return chunk

    def write(self, data: bytes) -> None:
        """Send; ``drain()`` before more than a little follows."""
        self._transport.write(data)

    async def drain(self) -> bool:
        """Wait until the server has taken most of what was written; false when it never will."""
        if self._drained is not None:
            await self._drained
        return not self._transport.is_closing()

    def end_upload(self) -> None:
        """Note that all of the request was written."""
        self._uploading = False

    # The event loop's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        answer = self.answer
        if not self._busy or answer.complete:
            self.close()  # bytes that nobody asked for
            return
        if self.error is not None:
            return
        try:
            answer.feed(data)
        except UpstreamInvalidResponse as error:
            self.fail(error)
            return
        if self._sink is not None and not answer.complete and self._passes_on(self._sink):
            return
        if answer.parts and not answer.complete:
            self._buffered += len(data)
            if self._buffered > HIGH_WATER:
                self._pause()
        if answer.head_done:
            self._wake()

    def eof_received(self) -> None:
        """Called by the event loop; returning nothing closes the connection."""
        if self.answer.feed_eof():
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        if self._busy and self._uploading and isinstance(error, OSError):
            self._salvage()
        if self._busy and not self.answer.complete:
            lost = UpstreamDisconnected("The model's server closed the connection before its answer was complete.")
            lost.__cause__ = error
            self.fail(lost)
        self.answer.discard()
        self.resume_writing()
        self._on_gone(self)

    def _passes_on(self, sink: Sink) -> bool:
        """Whether there is nothing left for whoever waits."""
        parts = self.answer.parts
        if not parts:
            return True
        try:
            taken = sink(parts[0] if len(parts) == 1 else b"".join(parts))
        except Exception as error:
            parts.clear()
            self.fail(error)  # for whoever waits, not for the event loop
            return True
        if not taken:
            self._sink = None  # what follows must not overtake it
            return False
        parts.clear()
        if self._timer is not None:
            self._heard = self._loop.time()  # a timer for each piece costs more than to pass it on
        return True

    def _time_out(self) -> None:
        left = self._heard + self._limit - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._time_out)
            return
        self._timer = None
        self.fail(UpstreamTimeout("The model's server did not answer in time."))

    def _salvage(self) -> None:
        """Read the answer of a server that refused an upload and hung up: sending failed, its words are still here."""
        if self._transport.get_extra_info("sslcontext") is not None:
            return
        fd = self._transport.get_extra_info("socket").fileno()
        try:
            while not self.answer.complete and self._buffered <= HIGH_WATER:
                data = os.read(fd, HIGH_WATER)
                if not data:
                    self.eof_received()
                    return
                self.data_received(data)
        except OSError:
            pass  # there is no more
