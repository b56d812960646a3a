"""A request's body and the news that its client has left: the one reader of ``receive()``.

A small body is collected, a larger one is handed on as it comes; either way it is counted against the limit.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import anyio

from fluidmcp_proxy.errors import InvalidTarget, RequestTimeout, RequestTooLarge
from fluidmcp_proxy.gateway.patience import at_most

__all__ = ["COLLECTED_BYTES", "ClientDisconnected", "RequestBody"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

COLLECTED_BYTES = 64 * 1024
"""Bodies up to this many bytes are sent in one piece."""


_LENGTH = re.compile(rb"[0-9]{1,19}").fullmatch  # int() refuses thousands of digits


class ClientDisconnected(Exception):
    """The client has left before its request was complete."""


class RequestBody:
    """The body of one request, readable once.

    ``declared`` is its content-length, ``chunked`` whether it has an unknown length. It may have ``limit`` bytes, and
    the client may fall silent for ``patience`` seconds.
    """

    __slots__ = (
        "_complete",
        "_first",
        "_limit",
        "_more",
        "_patience",
        "_read",
        "_receive",
        "_replaced",
        "chunked",
        "declared",
    )

    def __init__(self, receive: Receive, headers: Iterable[tuple[bytes, bytes]], limit: int, patience: float) -> None:
        self._receive = receive
        self._limit = limit
        self._patience = patience
        self._read = 0
        self._more = True
        self._first = b""
        self._complete: anyio.Event | None = None
        self._replaced: bytes | AsyncIterator[bytes] | None = None
        self.declared, self.chunked = _framing(headers)
        if self.declared is not None and self.declared > limit:
            raise self._too_large()

    async def start(self) -> bytes | AsyncIterator[bytes] | None:
        """What to send: None for no body, the whole of a small one, an iterator over a larger one.

        Raises:
            ClientDisconnected: it left.
            RequestTimeout: it fell silent.
            RequestTooLarge: over the limit.
        """
        if self._replaced is not None:
            return self._replaced
        if self.declared is None and not self.chunked:
            # Only now is it known that there is none: HTTP/2 needs no framing header for a body.
            self._first = await self._next()
            return self if self._more else self._first or None
        pieces: list[bytes] = []
        while self._more and self._read <= COLLECTED_BYTES:
            pieces.append(await self._next())
        self._first = b"".join(pieces)
        return self if self._more else self._first

    def replace(self, content: bytes | AsyncIterator[bytes]) -> None:
        """Have the next ``start`` give ``content``, which was made of what this one gave."""
        self._replaced = content

    @property
    def beginning(self) -> bytes:
        """What was collected and has not been read as an iterator yet."""
        return self._first

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next piece; raises as ``start`` does."""
        if self._first:
            first, self._first = self._first, b""
            return first
        while self._more:
            if piece := await self._next():
                return piece
        raise StopAsyncIteration

    async def client_left(self) -> None:
        """Return once the client is gone; until the body is complete that is the body's reader to notice."""
        if self._more:
            self._complete = anyio.Event()
            await self._complete.wait()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return

    async def _next(self) -> bytes:
        try:
            message = await at_most(self._patience, self._receive())
        except TimeoutError:
            raise RequestTimeout(f"The request body stopped coming for {self._patience:g} s (body_timeout).") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        piece: bytes = message.get("body", b"")
        self._read += len(piece)
        if self._read > self._limit:
            raise self._too_large()
        if not message.get("more_body", False):
            self._more = False
            if self._complete is not None:
                self._complete.set()
        return piece

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body is larger than {self._limit} bytes (max_body_bytes).")


def _framing(headers: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, bool]:
    """Content-length and whether there is a transfer-encoding (RFC 9112 §6.3).

    Raises:
        InvalidTarget: both, or two lengths, or one that is no number: two readers would see two bodies. Or an Upgrade
            beside it: httptools takes the body for the other protocol's, and uvicorn loses it.
    """
    lengths: list[bytes] = []
    encodings: list[bytes] = []
    upgrades = False
    for name, value in headers:
        if name == b"content-length":
            lengths.append(value)
        elif name == b"transfer-encoding":
            encodings.append(value)
        elif name == b"upgrade":
            upgrades = True
    if len(lengths) > 1 or (lengths and encodings) or (lengths and not _LENGTH(lengths[0])):
        raise InvalidTarget("The request's length is ambiguous: one Content-Length or one Transfer-Encoding, not both.")
    if encodings and [value.strip().lower() for value in encodings] != [b"chunked"]:
        raise InvalidTarget("The only Transfer-Encoding that is understood is chunked.")
    if upgrades and (encodings or (lengths and lengths[0].strip(b"0"))):
        raise InvalidTarget(
            "A request with a body cannot ask for an Upgrade; use plain HTTP/1.1 (Java: HttpClient.Version.HTTP_1_1).",
            headers=[(b"connection", b"close")],
        )
    return (int(lengths[0]) if lengths else None), bool(encodings)
