"""One answer as it is parsed: its head, the bytes of its body that nobody took yet, and whether it is at its end.

It reads no socket. What is not HTTP/1.1, or could be read in two ways, is refused (RFC 9112 §6.3, §11.2).
"""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from fluidmcp_proxy.errors import UpstreamInvalidResponse

__all__ = ["Answer"]

# Bytes of a head, of trailers, or of a chunk extension. A server that sends more is broken or hostile.
_MAX_HEAD = 64 * 1024

_SPECIAL = frozenset({b"content-length", b"transfer-encoding", b"keep-alive"})


class Answer:
    """The answers of one connection, one after the other.

    ``clean`` turns false, for good, as soon as the connection cannot be used for another exchange. ``keep_alive`` is
    how many seconds the server says it keeps the connection.
    """

    __slots__ = (
        "_barren",
        "_fields",
        "_framed",
        "_head_only",
        "_interim",
        "_parser",
        "_refused",
        "clean",
        "complete",
        "head_done",
        "headers",
        "keep_alive",
        "on_body",
        "parts",
        "reason",
        "status",
    )

    def __init__(self) -> None:
        self.clean = True
        self.keep_alive: float | None = None
        self.parts: list[bytes] = []
        # The parser appends to the list itself: no Python frame for a chunk.
        self.on_body = self.parts.append
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self.begin(head_only=False)

    def begin(self, *, head_only: bool) -> None:
        """Expect the next answer; ``head_only`` if it will have no body whatever it says (HEAD)."""
        self.parts.clear()
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.reason = b""
        self.head_done = self.complete = False
        self._head_only = head_only
        self._interim = self._framed = self._refused = False
        self._barren = self._fields = 0

    def feed(self, data: bytes) -> None:
        """Parse; raises UpstreamInvalidResponse, unless the answer was already complete and only its sequel is bad."""
        assert self._parser is not None
        parts_before, head_before = len(self.parts), self.head_done
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.clean = False
            if not self.complete:
                raise UpstreamInvalidResponse("The model's server did not answer in HTTP/1.1.") from error
        if len(self.parts) != parts_before:
            self._barren = 0
        elif head_before == self.head_done:
            self._barren += len(data)
        if self._refused or (self._barren > _MAX_HEAD and not self.complete):
            self.clean = False
            raise UpstreamInvalidResponse("The model's server did not answer in HTTP/1.1.")
        if self._head_only:
            self.parts.clear()

    def feed_eof(self) -> bool:
        """Note that nothing follows; true if that is the end of the answer (RFC 9112 §6.3, the last rule)."""
        self.clean = False
        if self.head_done and not self._framed:
            self.complete = True
        return self.complete

    def discard(self) -> None:
        """Let go of the parser, which refers to this object."""
        self.clean = False
        self._parser = None

    # The parser's side.

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self.complete:
            # An answer to nothing. Its bytes must not be taken for this one's, so the parser stops here.
            self.clean = False
            raise HttpParserError("surplus")

    def on_status(self, reason: bytes) -> None:
        """Called by the parser."""
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser; for trailers too, which are dropped."""
        if self.head_done:
            return
        name = name.lower()
        self._fields += len(name) + len(value)
        if name in _SPECIAL:
            self._note(name, value)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._interim = True
            return
        if status < 200 or self._fields > _MAX_HEAD or not parser.get_http_version().startswith("1."):
            self._refused = True
        if self._refused:
            return
        self.status = status
        self.head_done = True
        if not parser.should_keep_alive():
            self.clean = False
        if self._head_only:
            # The parser cannot be told that no body follows, hence it is not used again.
            self.complete = True
            self.clean = False

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._interim:
            self._interim = self._framed = False
            self.headers.clear()
            self.reason = b""
        elif self.head_done:
            self.complete = True

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"keep-alive":
            self.keep_alive = _keep_alive(value)
        else:
            self._framed = True
            # Any other coding would be passed on as if it were the content (RFC 9112 §6.1).
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                self._refused = True


def _keep_alive(value: bytes) -> float | None:
    for parameter in value.split(b","):
        name, _, seconds = parameter.strip().partition(b"=")
        if name.lower() == b"timeout" and seconds.isdigit():
            return float(seconds)
    return None
