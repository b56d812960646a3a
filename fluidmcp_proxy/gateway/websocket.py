"""One WebSocket through the gateway: messages to the model's server and back, until one of the two ends it.

Two tasks: one reads the client and is the only reader of ``receive()``, the other reads the server. Either waits while
the other side does not take what it brings, so a slow client slows the server, and the reverse. Pings are not
forwarded: each hop has its own, and those of the client's are up to the ASGI server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from fluidmcp_proxy.errors import GatewayError, RequestTooLarge, ShuttingDown, UpstreamError, UpstreamUnavailable
from fluidmcp_proxy.models.scheduler import Lease
from fluidmcp_proxy.upstream.endings import HandshakeRefused, WebSocketClosed, can_be_sent, fit_reason
from fluidmcp_proxy.upstream.headers import response_headers
from fluidmcp_proxy.upstream.websocket import WebSocket

if TYPE_CHECKING:
    from fluidmcp_proxy.gateway.tracing import Trace

__all__ = ["HANDSHAKE_HEADERS", "Handshake", "WebSocketRelay", "refuse"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Pairs = Sequence[tuple[bytes, bytes]]

HANDSHAKE_HEADERS = frozenset(
    {
        b"sec-websocket-key",
        b"sec-websocket-version",
        b"sec-websocket-extensions",
        b"sec-websocket-protocol",
        b"sec-websocket-accept",
        b"content-length",
    }
)
"""Headers that belong to one hop's handshake. It has no body, whatever a client says of its length."""

_CONNECT_TRIES = 2
# Seconds for which a client that reads nothing may keep its last frame waiting.
_FAREWELL_TIMEOUT = 5.0

# RFC 6455 §7.4.1 and, for 1012 (come back later), the IANA registry of close codes.
_TOO_BIG, _INTERNAL_ERROR, _SERVICE_RESTART, _POLICY_VIOLATION, _NORMAL = 1009, 1011, 1012, 1008, 1000
_NO_STATUS, _ABNORMAL = 1005, 1006


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the model's server is asked. ``max_message`` limits the messages of both directions, in bytes."""

    target: bytes
    headers: list[tuple[bytes, bytes]]
    subprotocols: Sequence[str]
    request_id: bytes
    max_message: int


class WebSocketRelay:
    """The way of one WebSocket. After ``run()`` its counters say how it went.

    ``status`` is 101 once the client's handshake has been answered; ``outcome`` one of ``complete`` (somebody closed it
    in good form), ``client_left``, ``upstream_died``, ``cut``, and ``refused`` (a message was too large). The server's
    messages are counted in the lease.
    """

    __slots__ = (
        "_end", "_handshake", "_lease", "_left", "_open", "_receive", "_send", "_socket", "_trace", "outcome", "status",
    )  # fmt: skip

    _socket: WebSocket

    def __init__(
        self, handshake: Handshake, lease: Lease, receive: Receive, send: Send, trace: Trace | None = None
    ) -> None:
        self._handshake = handshake
        self._lease = lease
        self._receive = receive
        self._send = send
        self._trace = trace
        self._open = anyio.Event()
        self._left: tuple[int, str] | None = None
        self._end: GatewayError | HandshakeRefused | WebSocketClosed | None = None
        self.status = 0
        self.outcome = "client_left"

    @property
    def code(self) -> str:
        """That of the error with which it ended, or ``-``."""
        return self._end.code if isinstance(self._end, GatewayError) else "-"

    async def run(self) -> None:
        """Connect the client with the server until either closes.

        Raises:
            GatewayError, HandshakeRefused: the client's handshake was not answered yet, so that it can be refused.
        """
        async with anyio.create_task_group() as race:
            self._lease.interrupt = race.cancel_scope.cancel
            race.start_soon(self._watch_client, race.cancel_scope)
            try:
                await self._forward()
            except (GatewayError, HandshakeRefused, WebSocketClosed) as end:
                self._end = end
            except OSError:
                pass  # what send() raises when the client is gone
            race.cancel_scope.cancel()
        if self._lease.was_cut and not isinstance(self._end, WebSocketClosed):
            self._end = self._lease.shutting_down()
        self.outcome = self._how_it_ended()
        if self._end is not None and self._left is None:
            await self._tell(self._end)

    async def _forward(self) -> None:
        asked = self._handshake
        for tries_left in reversed(range(_CONNECT_TRIES)):
            try:
                async with (
                    self._lease as transport,
                    (transport if self._trace is None else self._trace.over(transport)).open_websocket(
                        asked.target, asked.headers, asked.subprotocols, max_message=asked.max_message
                    ) as socket,
                ):
                    await self._converse(socket)
                return
            except UpstreamUnavailable:
                # Not a byte has left. Its supervisor may not know yet that the server is gone: ask again.
                if not tries_left:
                    raise
                await anyio.sleep(0.05)

    async def _converse(self, socket: WebSocket) -> None:
        send, lease = self._send, self._lease
        try:
            await send({"type": "websocket.accept", "subprotocol": socket.subprotocol, "headers": self._answer(socket)})
            self.status, self._socket = 101, socket
            self._open.set()
            while True:
                message = await socket.receive()
                lease.count(socket.bytes_received - lease.bytes_answered)
                await send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})
        finally:
            if self._left is not None:
                await socket.close(*self._left)

    def _answer(self, socket: WebSocket) -> list[tuple[bytes, bytes]]:
        headers = response_headers(socket.headers, request_id=self._handshake.request_id)
        return [pair for pair in headers if pair[0] not in HANDSHAKE_HEADERS]

    async def _watch_client(self, scope: anyio.CancelScope) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self._left = message.get("code", _NO_STATUS), message.get("reason") or ""
                break
            await self._open.wait()
            text: str | None = message.get("text")
            content: str | bytes = message["bytes"] if text is None else text
            if _size(content) > self._handshake.max_message:
                self._end = RequestTooLarge("The message is too large (max_body_bytes).")
                break
            await self._socket.send(content)
        scope.cancel()

    def _how_it_ended(self) -> str:
        if self._left is not None:
            return "client_left" if self._left[0] in (_NO_STATUS, _ABNORMAL) else "complete"
        if isinstance(self._end, WebSocketClosed | HandshakeRefused):
            return "complete"
        if self._lease.was_cut:
            return "cut"
        if isinstance(self._end, GatewayError):
            return "upstream_died" if isinstance(self._end, UpstreamError) else "refused"
        return "client_left"

    async def _tell(self, end: GatewayError | HandshakeRefused | WebSocketClosed) -> None:
        """Pass the end on: by an answer where the handshake has none yet, else by a close."""
        if not self.status:
            raise end
        code, reason = _farewell(end)
        with anyio.move_on_after(_FAREWELL_TIMEOUT):
            try:
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
            except OSError:
                pass  # it has left meanwhile


def _farewell(end: GatewayError | HandshakeRefused | WebSocketClosed) -> tuple[int, str]:
    """The code and the reason of the client's Close frame. ASGI cannot close without a code, so none becomes 1000."""
    if isinstance(end, WebSocketClosed):
        return (end.code, end.reason) if can_be_sent(end.code) else (_NORMAL, "")
    assert isinstance(end, GatewayError)
    code = _INTERNAL_ERROR
    if isinstance(end, ShuttingDown):
        code = _SERVICE_RESTART
    elif isinstance(end, RequestTooLarge):
        code = _TOO_BIG
    return code, fit_reason(f"{end.code}: {end.message}")


def _size(message: str | bytes) -> int:
    return len(message) if isinstance(message, bytes) else len(message.encode())


async def refuse(scope: Scope, send: Send, status: int, headers: Pairs, body: bytes) -> None:
    """Answer a handshake by HTTP, where the ASGI server can; else by a close, which it makes a 403."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        return
    fields = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": status, "headers": fields})
    await send({"type": "websocket.http.response.body", "body": body})
