"""The framing of a request: which headers say how long its body is, and whether the body keeps to it (RFC 9112 §6).

Pure: it writes nothing to the wire.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fluidmcp_proxy.errors import InvalidTarget

if TYPE_CHECKING:
    from fluidmcp_proxy.upstream.client import Body, Headers

__all__ = ["Framing", "encode_head", "frame"]

_TARGET = re.compile(rb"[!-~]+").fullmatch  # RFC 9112 §3.2
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch  # token, RFC 9110 §5.6.2
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Methods whose requests state a length even when there is no content (RFC 9110 §8.6).
_STATES_LENGTH = frozenset({b"POST", b"PUT", b"PATCH"})


class Framing:
    """The headers to send, and the account of a body that is sent piece by piece."""

    __slots__ = ("body", "chunked", "headers", "left")

    def __init__(self, headers: Headers, body: Body, *, chunked: bool, length: int) -> None:
        self.headers = headers
        self.body = body
        self.chunked = chunked
        self.left = length

    def count(self, size: int) -> None:
        """Note ``size`` bytes that are about to be sent; one too many would be read as the next request."""
        if not self.chunked:
            self.left -= size
            if self.left < 0:
                raise InvalidTarget("The request's body is longer than its Content-Length.")

    def finish(self) -> None:
        """Note the end of the body."""
        if not self.chunked and self.left:
            raise InvalidTarget("The request's body is shorter than its Content-Length.")


def frame(method: bytes, target: bytes, headers: Headers, body: Body) -> Framing:
    """Decide how ``body`` is framed; raises InvalidTarget where the request contradicts itself."""
    if not (_METHOD(method) and _TARGET(target)):
        raise InvalidTarget("The request line has characters that it cannot carry.")
    length = _stated_length(headers)
    if body is None or isinstance(body, bytes):
        return _frame_whole(method, headers, body or b"", length)
    if length is not None:
        return Framing(headers, body, chunked=False, length=length)
    return Framing([*headers, (b"transfer-encoding", b"chunked")], body, chunked=True, length=0)


def _frame_whole(method: bytes, headers: Headers, body: bytes, length: int | None) -> Framing:
    if length is not None:
        if length != len(body):
            raise InvalidTarget("The request's body is not as long as its Content-Length.")
    elif body or method in _STATES_LENGTH:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    return Framing(headers, body or None, chunked=False, length=len(body))


def _stated_length(headers: Headers) -> int | None:
    length: int | None = None
    for name, value in headers:
        if name not in _FRAMING:
            continue
        if name == b"content-length":
            if length is not None or not value.isdigit():
                raise InvalidTarget("The request's Content-Length is doubled or not a number.")
            length = int(value)
        else:
            raise InvalidTarget("The transport frames the body itself; Transfer-Encoding is not forwarded.")
    return length


def encode_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """Return the request line and the headers as they go over the wire; raises InvalidTarget on an injected line."""
    lines = [b"%b %b HTTP/1.1" % (method, target), *map(b": ".join, headers), b"\r\n"]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
        raise InvalidTarget("A header of the request has a line break or a NUL.")
    return head
