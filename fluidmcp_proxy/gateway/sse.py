"""Server-sent events cut at their boundaries: pure, on bytes.

An error that has to be told inside a stream must not land inside an event, so whole events are passed on as they arrive
and the rest of an unfinished one waits for its end.
"""

from __future__ import annotations

__all__ = ["MAX_TAIL_BYTES", "EventSplitter", "is_event_stream"]

MAX_TAIL_BYTES = 1024 * 1024
"""An unfinished event that is longer is passed on as it is."""

# A line ends with LF, CRLF or CR, an event with an empty line (WHATWG HTML §9.2.5).
_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventSplitter:
    """Holds back the unfinished event at the end of a stream."""

    __slots__ = ("_last", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._last = b""

    def is_whole(self, chunk: bytes) -> bool:
        """Whether ``feed`` would pass on just ``chunk``."""
        return not self._tail and chunk.endswith(_ENDS)

    def feed(self, chunk: bytes) -> bytes:
        """What can be passed on now, perhaps nothing."""
        if not self._tail and chunk.endswith(_ENDS):  # nearly always
            self._last = chunk
            return chunk
        data = self._tail + chunk
        end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _ENDS)
        if end == 0 and len(data) > MAX_TAIL_BYTES:
            end = len(data)
        ready, self._tail = data[:end], data[end:]
        if ready:
            self._last = ready
        return ready

    def rest(self) -> bytes:
        """The unfinished event, of a stream that has ended cleanly all the same."""
        tail, self._tail = self._tail, b""
        return tail

    @property
    def at_boundary(self) -> bool:
        """Whether what was passed on ends with a whole event, so that another one may follow."""
        return not self._last or self._last.endswith(_ENDS)

    @property
    def is_done(self) -> bool:
        """Whether the last event that was passed on is OpenAI's ``[DONE]``: nothing may follow it."""
        return b"data: [DONE]" in self._last[-64:] or b"data:[DONE]" in self._last[-64:]


def is_event_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a body is SSE that can be read: of that type, and without a content coding."""
    kind = b""
    for name, value in headers:
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            return False
    return kind.partition(b";")[0].strip().lower() == b"text/event-stream"
