"""Answers that the gateway gives itself, sent over ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from fluidmcp_proxy.errors import GatewayError, RequestTimeout
from fluidmcp_proxy.upstream.headers import pick_request_id

__all__ = ["Receive", "Send", "respond", "respond_with_error"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def respond_with_error(
    scope: Scope, send: Send, error: GatewayError, *, request_id: bytes | None = None, anthropic: bool = False
) -> None:
    """Answer with ``error`` in the form of the API that was asked."""
    body = error.body(anthropic=anthropic)
    identity = request_id or pick_request_id(scope["headers"])
    headers = error.headers
    if isinstance(error, RequestTimeout) and scope.get("http_version", "1.1").startswith("1"):
        headers.append((b"connection", b"close"))  # RFC 9110 §15.5.9; HTTP/2 has no such header
    await respond(send, error.status, body, identity, headers, with_body=scope["method"] != "HEAD")


async def respond(
    send: Send,
    status: int,
    body: bytes,
    request_id: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    with_body: bool = True,
    media_type: bytes = b"application/json",
) -> None:
    """Answer with a body; a HEAD request gets its length only."""
    fields = [
        (b"content-type", media_type),
        (b"content-length", str(len(body)).encode()),
        *headers,
        (b"x-request-id", request_id),
    ]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body if with_body else b""})
