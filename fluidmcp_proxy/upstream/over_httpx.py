"""``exchange`` over any httpx transport: on trio, in tests with ``httpx.MockTransport``, or with one a user hands in.

This is the one seam where httpx's exceptions become ours. No ``httpx.AsyncClient`` is involved, hence no cookies,
proxies, redirects, decompression or normalised paths.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from fluidmcp_proxy.errors import (
    InvalidTarget,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamInvalidResponse,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from fluidmcp_proxy.upstream.framing import Framing, frame

if TYPE_CHECKING:
    from fluidmcp_proxy.upstream.client import Address, Body, Headers, Timeouts
    from fluidmcp_proxy.upstream.websocket import WebSocket

__all__ = ["OverHttpx"]

_HUNG_UP = re.compile("disconnected|closed connection").search
_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b"HTTP/3")
# A TLS peer that does not say goodbye is not waited for.
_CLOSE_DEADLINE = 1.0


class OverHttpx:
    """The connections to one server, kept by an ``httpx.AsyncBaseTransport``."""

    def __init__(
        self,
        address: Address,
        timeouts: Timeouts,
        *,
        keep_alive: float = 4.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._address = address
        self._timeouts = timeouts
        self._url = httpx.URL(address.url + "/")
        self._transport = transport or _plain(address, keep_alive)

    def __repr__(self) -> str:
        return f"<OverHttpx {self._address.url} over {type(self._transport).__name__}>"

    def exchange(self, method: bytes, target: bytes, headers: Headers, body: Body = None) -> _Exchange:
        """See ``Transport.exchange``."""
        framing = frame(method, target, headers, body)
        timeouts = self._timeouts
        # httpx's read time-out is for the answer's head first; ``_Body`` turns it into the one for a silence.
        timeout = {"connect": timeouts.connect, "read": timeouts.first_byte, "write": None, "pool": None}
        request = httpx.Request(
            "POST",
            self._url,
            headers=framing.headers,
            stream=_Upload(framing),
            extensions={"target": target, "timeout": timeout},
        )
        request.method = method.decode("ascii")
        return _Exchange(self._transport, request, timeouts.idle, timeout)

    def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AbstractAsyncContextManager[WebSocket]:
        """Refuse: httpx speaks no WebSocket."""
        raise UpstreamUnavailable("WebSockets are forwarded on asyncio only.")

    async def aclose(self) -> None:
        """Close every connection."""
        with _ours():
            await self._transport.aclose()


def _plain(address: Address, keep_alive: float) -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(
        verify=ssl.create_default_context() if address.scheme == "https" else True,
        trust_env=False,
        http1=True,
        http2=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=keep_alive),
        uds=address.uds,
        retries=0,
    )


class _Upload(httpx.AsyncByteStream):
    """The request's body, held to its content-length."""

    def __init__(self, framing: Framing) -> None:
        self._framing = framing

    async def __aiter__(self) -> AsyncIterator[bytes]:
        framing = self._framing
        if isinstance(framing.body, bytes):
            yield framing.body
        elif framing.body is not None:
            async for chunk in framing.body:
                framing.count(len(chunk))
                if chunk:
                    yield chunk
            framing.finish()


class _Exchange:
    """The context of one exchange."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        request: httpx.Request,
        idle: float | None,
        timeout: dict[str, float | None],
    ) -> None:
        self._transport = transport
        self._request = request
        self._idle = idle
        self._timeout = timeout
        self._response: httpx.Response | None = None
        self._body: _Body | None = None

    async def __aenter__(self) -> _Answer:
        with _ours():
            response = self._response = await self._transport.handle_async_request(self._request)
        if _is_nonsense(response):
            await self.__aexit__(None, None, None)
            raise UpstreamInvalidResponse("The model's server did not answer in HTTP/1.1.")
        self._timeout["read"] = self._idle
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._body = _Body(response.stream)
        return _Answer(response, self._body)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._response is None:
            return
        with anyio.move_on_after(_CLOSE_DEADLINE, shield=True), _ours():
            if self._body is not None:
                await self._body.aclose()
            await self._response.aclose()


def _is_nonsense(response: httpx.Response) -> bool:
    """What h11 lets through: an odd version, and two ways to say how long the body is (RFC 9112 §6.3)."""
    return (
        response.status_code < 200
        or response.extensions.get("http_version", b"HTTP/1.1") not in _VERSIONS
        or ("content-length" in response.headers and "transfer-encoding" in response.headers)
    )


class _Answer:
    """A ``Response``."""

    __slots__ = ("body", "ended", "headers", "reason", "status")

    def __init__(self, response: httpx.Response, body: _Body) -> None:
        self.ended = False
        self.status = response.status_code
        self.reason: bytes = response.extensions.get("reason_phrase", b"")
        self.headers = [(name.lower(), value) for name, value in response.headers.raw]
        self.body: AsyncIterator[bytes] = body

    async def pour(self, sink: object) -> None:
        """See ``Response.pour``: httpx has no callbacks."""


class _Body:
    """Raw chunks. Not a generator, because trio wants those closed by hand: ``aclose`` does that for httpx's."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._chunks = stream.__aiter__()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with _ours():
            while True:
                chunk = await self._chunks.__anext__()
                if chunk:
                    return chunk

    async def aclose(self) -> None:
        close: Any = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:  # a host name that is none, on trio
        raise UpstreamUnavailable("The model's server cannot be reached.") from error
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise _translate(error) from error


def _translate(error: Exception) -> UpstreamError | InvalidTarget:
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
            return UpstreamUnavailable("The model's server cannot be reached.")
        case httpx.TimeoutException():
            return UpstreamTimeout("The model's server did not answer in time.")
        case httpx.RemoteProtocolError() if not _HUNG_UP(str(error)):
            # httpcore has one class for nonsense and for a connection that ends too early.
            return UpstreamInvalidResponse("The model's server did not answer in HTTP/1.1.")
        case httpx.LocalProtocolError():
            return InvalidTarget("The request cannot be written as HTTP/1.1.")
        case _:
            return UpstreamDisconnected("The model's server closed the connection before its answer was complete.")
