"""How a WebSocket to a model's server can end: the codes, the exceptions, and what the protocol says about it. Pure."""

from __future__ import annotations

from typing import TypeVar

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus, PayloadTooBig
from websockets.http11 import Response

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamInvalidResponse

__all__ = ["HandshakeRefused", "WebSocketClosed", "can_be_sent", "ending_of", "fit_reason", "lost", "pairs_of"]

_MAX_REASON_BYTES = 123  # of a control frame's 125 (RFC 6455 §5.5), less the code

Error = TypeVar("Error", bound=Exception)


class HandshakeRefused(Exception):
    """The server answered the handshake with something else than 101: ``status``, ``headers``, ``body``.

    The body is as it was sent; ``websockets`` reads at most 1 MiB of it, and takes more for nonsense.
    """

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        super().__init__(f"the model's server answered the handshake with {status}")
        self.status = status
        self.headers = headers
        self.body = body


class WebSocketClosed(Exception):
    """The server closed the connection in good form. ``code`` is 1005 if it gave none (RFC 6455 §7.1.5)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code}")
        self.code = code
        self.reason = reason


def can_be_sent(code: int) -> bool:
    """Whether a Close frame may carry ``code`` (RFC 6455 §7.4): 1005, 1006 and 1015 only describe an end without it."""
    return (1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999


def fit_reason(reason: str) -> str:
    """As much of ``reason`` as a Close frame has room for."""
    return reason.encode()[:_MAX_REASON_BYTES].decode("utf-8", "ignore")


def ending_of(wire: ClientProtocol, response: Response | None) -> Exception | None:
    """Why nothing more will come from ``wire``, if so. ``response`` is the answer to the handshake once it was read."""
    if wire.handshake_exc is not None:
        return _failed_handshake(wire.handshake_exc, response)
    if wire.close_rcvd is not None and wire.parser_exc is None:
        return WebSocketClosed(wire.close_rcvd.code, wire.close_rcvd.reason)
    if wire.parser_exc is None:
        return None
    if isinstance(wire.parser_exc, EOFError):
        return lost(wire.parser_exc)
    what = "is too large" if isinstance(wire.parser_exc, PayloadTooBig) else "breaks the WebSocket protocol"
    return _caused(UpstreamInvalidResponse(f"What the model's server sent {what}."), wire.parser_exc)


def _failed_handshake(error: Exception, response: Response | None) -> Exception:
    if isinstance(error, InvalidStatus) and error.response.status_code >= 200:
        answer = error.response
        return HandshakeRefused(answer.status_code, pairs_of(answer), bytes(answer.body or b""))
    if isinstance(error.__cause__, EOFError) and response is None:
        return lost(error)
    return _caused(UpstreamInvalidResponse("The model's server answered the WebSocket handshake with nonsense."), error)


def pairs_of(response: Response) -> list[tuple[bytes, bytes]]:
    """The headers of ``response``, names in lower case."""
    # Other bytes than ASCII are Latin-1 in websockets 17, surrogates before.
    return [
        (name.lower().encode("ascii"), value.encode("latin-1", "surrogateescape"))
        for name, value in response.headers.raw_items()
    ]


def lost(cause: Exception | None) -> UpstreamDisconnected:
    """What a connection that ends without a Close frame raises."""
    return _caused(UpstreamDisconnected("The connection to the model's server was lost."), cause)


def _caused(error: Error, cause: Exception | None) -> Error:
    error.__cause__ = cause
    return error
