"""One model's server as its callers see it: an address, time-outs, and a transport to exchange requests with.

It names the interface and picks the implementation; the wire itself is in ``transport`` (asyncio) and ``over_httpx``
(trio, or a transport that somebody hands in).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import httpx

from fluidmcp_proxy.upstream.as_httpx import HttpxFace
from fluidmcp_proxy.upstream.connection import Sink
from fluidmcp_proxy.upstream.over_httpx import OverHttpx
from fluidmcp_proxy.upstream.transport import AsyncioTransport, is_asyncio
from fluidmcp_proxy.upstream.websocket import WebSocket

__all__ = [
    "Address",
    "Body",
    "Headers",
    "HttpTransport",
    "Response",
    "Sink",
    "Timeouts",
    "Transport",
    "open_client",
    "open_transport",
]

Headers = Sequence[tuple[bytes, bytes]]
Body = bytes | AsyncIterator[bytes] | None
"""An iterator is read once, after connecting. It may have a ``beginning``: bytes of it that are known before."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """Where a model's server listens.

    ``root`` is the path before ``/v1``, without a final slash: ``""`` or ``"/api"``. With ``uds``, the path of a Unix
    socket, ``host`` and ``port`` only name the server in the Host header.
    """

    scheme: str
    host: str
    port: int
    root: str = ""
    uds: str | None = None

    @cached_property
    def authority(self) -> bytes:
        """The value of the Host header: without the scheme's own port, an IPv6 address in brackets (RFC 9110 §7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (host if self.port == _DEFAULT_PORTS.get(self.scheme) else f"{host}:{self.port}").encode("ascii")

    @property
    def url(self) -> str:
        """The server's root as a URL, without a final slash."""
        return f"{self.scheme}://{self.authority.decode()}{self.root}"


class Timeouts(NamedTuple):
    """In seconds, None for no limit.

    ``connect`` until connected (TLS included), ``first_byte`` from the request's last byte to the end of the answer's
    head, ``idle`` for a silence inside the answer's body.
    """

    connect: float | None = 5.0
    first_byte: float | None = None
    idle: float | None = None


_DEFAULT_TIMEOUTS = Timeouts()


class Response(Protocol):
    """An answer whose head has arrived. ``body`` gives raw bytes, once, as they come."""

    @property
    def status(self) -> int:
        """The status code; never a 1xx."""

    @property
    def reason(self) -> bytes:
        """The reason phrase as the server wrote it."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Names in lower case; order and repetition as received."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and ``body`` has given all of it; may be false where that is not known yet."""

    @property
    def body(self) -> AsyncIterator[bytes]:
        """Raw, not decoded, never an empty chunk. Raises as ``exchange`` does when the answer breaks off."""

    async def pour(self, sink: Sink) -> None:
        """Give pieces of the body to ``sink`` as they arrive, each within the event loop's own callback.

        Nobody is woken for them. It returns when there is something for ``body`` to give or to raise: a piece that
        ``sink`` refused, the last one, the end, or why there is none; where nothing of this is known, at once.
        """


class HttpTransport(Protocol):
    """The connections to one model's server, for requests."""

    def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AbstractAsyncContextManager[Response]:
        """Send a request, byte for byte, and yield its answer; leaving early closes the connection.

        ``target`` is what the request line shows, so it begins with the address's ``root``. ``headers`` have names in
        lower case, a ``host``, and no ``transfer-encoding``: a body of unknown length is sent chunked, a
        ``content-length`` is sent as given and the body held to it.

        Raises:
            UpstreamUnavailable: connecting failed; nothing was sent, so another try is safe.
            UpstreamDisconnected: the server closed the connection too early.
            UpstreamInvalidResponse: the answer is not HTTP/1.1.
            UpstreamTimeout: first byte, or the next one, too late.
            InvalidTarget: the request cannot be written as HTTP/1.1, or its body is not as long as it says.
        """

    async def aclose(self) -> None:
        """Close every connection; exchanges under way end with ``UpstreamDisconnected``."""


class Transport(HttpTransport, Protocol):
    """The connections to one model's server."""

    def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AbstractAsyncContextManager[WebSocket]:
        """Open a WebSocket and yield it; leaving closes it. ``max_message`` limits what is received, in bytes.

        ``headers`` are as for ``exchange``; those of the handshake are added. The limit until the server has agreed
        is ``Timeouts.first_byte``; a WebSocket's silence has none.

        Raises:
            UpstreamUnavailable: connecting failed, so another try is safe; or this is not asyncio.
            HandshakeRefused: the server answered the handshake with something else than 101.
            UpstreamDisconnected, UpstreamInvalidResponse, UpstreamTimeout, InvalidTarget: as ``exchange`` does.
        """


def open_transport(
    address: Address,
    timeouts: Timeouts = _DEFAULT_TIMEOUTS,
    *,
    keep_alive: float = 4.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Transport:
    """Make the transport to ``address``; it connects when it is used, and costs nothing before.

    ``keep_alive`` is for how many seconds an idle connection may be used again; it must be less than the server keeps
    it (uvicorn, hence vLLM: 5). A ``transport`` that is handed in is used through httpx's interface.
    """
    if transport is not None:
        return OverHttpx(address, timeouts, keep_alive=keep_alive, transport=transport)
    return _AtFirstUse(address, timeouts, keep_alive)


class _AtFirstUse:
    """The transport for the event loop that the first exchange finds itself on."""

    __slots__ = ("_address", "_chosen", "_keep_alive", "_timeouts")

    def __init__(self, address: Address, timeouts: Timeouts, keep_alive: float) -> None:
        self._address = address
        self._timeouts = timeouts
        self._keep_alive = keep_alive
        self._chosen: Transport | None = None

    def __repr__(self) -> str:
        return f"<transport to {self._address.url}, unused>" if self._chosen is None else repr(self._chosen)

    def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AbstractAsyncContextManager[Response]:
        return (self._chosen or self._choose()).exchange(method, target, headers, body)

    def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AbstractAsyncContextManager[WebSocket]:
        chosen = self._chosen or self._choose()
        return chosen.open_websocket(target, headers, subprotocols, max_message=max_message)

    async def aclose(self) -> None:
        await (self._chosen or self._choose()).aclose()

    def _choose(self) -> Transport:
        kind = AsyncioTransport if is_asyncio() else OverHttpx
        self._chosen = kind(self._address, self._timeouts, keep_alive=self._keep_alive)
        return self._chosen


def open_client(transport: HttpTransport, address: Address) -> httpx.AsyncClient:
    """Make an ``httpx.AsyncClient`` over ``transport`` whose base URL is the server's ``/v1``.

    It obeys no proxy variable and follows no redirect. Closing it leaves the transport open: that has its own owner.
    """
    return httpx.AsyncClient(
        base_url=f"{address.url}/v1",
        transport=HttpxFace(transport),
        trust_env=False,
        timeout=None,  # noqa: S113 - a generation takes its time; the model's own time-outs apply below
    )
