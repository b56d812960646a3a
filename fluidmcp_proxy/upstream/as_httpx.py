"""A transport of ours with httpx's face, so that ``httpx.AsyncClient`` shares its connections.

Nothing of httpx is underneath here; the other direction is ``over_httpx``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import anyio
import httpx

from fluidmcp_proxy.errors import (
    GatewayError,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)

if TYPE_CHECKING:
    from fluidmcp_proxy.upstream.client import Body, HttpTransport, Response

__all__ = ["HttpxFace"]

# The transport frames the body itself and keeps connections as it sees fit.
_FRAMING = frozenset({b"connection", b"transfer-encoding"})


class HttpxFace(httpx.AsyncBaseTransport):
    """``handle_async_request`` over a ``HttpTransport``. It does not own the transport: closing does nothing."""

    def __init__(self, transport: HttpTransport) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return f"<HttpxFace of {self._transport!r}>"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Exchange one request; raises httpx's exceptions, as its callers expect."""
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        headers = [pair for pair in headers if pair[0] not in _FRAMING]
        timeouts = request.extensions.get("timeout", {})
        target: bytes = request.extensions.get("target", request.url.raw_path)
        exchange = self._transport.exchange(request.method.encode("ascii"), target, headers, _body(request))
        try:
            # The client's own read time-out (``client.post(…, timeout=5)``) comes on top of the model's.
            with anyio.fail_after(timeouts.get("read")):
                answer = await exchange.__aenter__()
        except GatewayError as error:
            raise _as_httpx(error, request) from error
        except TimeoutError as error:
            raise httpx.ReadTimeout("the model's server did not answer in time", request=request) from error
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Stream(exchange, answer, request, timeouts.get("read")),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": answer.reason},
        )

    async def aclose(self) -> None:
        """Leave the transport to its owner."""


def _body(request: httpx.Request) -> Body:
    try:
        return request.content or (b"" if "content-length" in request.headers else None)
    except httpx.RequestNotRead:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        return request.stream.__aiter__()


class _Stream(httpx.AsyncByteStream):
    def __init__(
        self,
        exchange: AbstractAsyncContextManager[Response],
        answer: Response,
        request: httpx.Request,
        timeout: float | None,
    ) -> None:
        self._exchange = exchange
        self._body = answer.body
        self._request = request
        self._timeout = timeout
        self._closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            with anyio.fail_after(self._timeout):
                return await self._body.__anext__()
        except GatewayError as error:
            raise _as_httpx(error, self._request) from error
        except TimeoutError as error:
            raise httpx.ReadTimeout("the model's server fell silent", request=self._request) from error

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._exchange.__aexit__(None, None, None)


def _as_httpx(error: GatewayError, request: httpx.Request) -> httpx.TransportError:
    match error:
        case UpstreamUnavailable():
            return httpx.ConnectError(error.message, request=request)
        case UpstreamTimeout():
            return httpx.ReadTimeout(error.message, request=request)
        case UpstreamDisconnected():
            return httpx.ReadError(error.message, request=request)
        case UpstreamError():
            return httpx.RemoteProtocolError(error.message, request=request)
        case GatewayError(status=503):  # the model is not there, and says why
            return httpx.ConnectError(error.message, request=request)
        case _:
            return httpx.LocalProtocolError(error.message, request=request)
