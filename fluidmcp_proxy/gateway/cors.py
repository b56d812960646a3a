"""What the pages of other sites get to read: CORS for the origins that the configuration lists.

Not Starlette's ``CORSMiddleware``: it answers in plain text and without a request id, before the request has been
checked. Which origins may come in at all is decided in ``access``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

__all__ = ["answering", "preflight"]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Pairs = Iterable[tuple[bytes, bytes]]

_MAX_AGE = b"600"
_ASKED_METHOD, _ASKED_HEADERS = b"access-control-request-method", b"access-control-request-headers"
# The model's server may have an opinion, too (vLLM allows every origin unless told otherwise): ours replaces it.
_OURS = frozenset(
    {b"access-control-allow-origin", b"access-control-allow-credentials", b"access-control-expose-headers"}
)


def preflight(method: str, headers: Pairs) -> list[tuple[bytes, bytes]] | None:
    """The headers of the answer to a preflight, None where the request is none (Fetch §3.3.2).

    It allows whatever is asked for: a key is needed all the same, and the router refuses methods.
    """
    if method != "OPTIONS":
        return None
    asked = {name: value for name, value in headers if name in (_ASKED_METHOD, _ASKED_HEADERS)}
    if _ASKED_METHOD not in asked:
        return None
    answer = [(b"access-control-allow-methods", asked[_ASKED_METHOD]), (b"access-control-max-age", _MAX_AGE)]
    if _ASKED_HEADERS in asked:
        answer.append((b"access-control-allow-headers", asked[_ASKED_HEADERS]))
    return [*answer, (b"vary", b"access-control-request-method, access-control-request-headers")]


def answering(send: Send, origin: bytes | None) -> Send:
    """``send``, with the answer's headers telling the browser that pages of ``origin`` may read it.

    None is for a request that comes from no such page; its answer must not be cached for one that does.
    """
    ours = [(b"vary", b"origin")]
    if origin is not None:
        ours += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", b"*")]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0] not in _OURS]
            message = {**message, "headers": kept + ours}
        await send(message)

    return send_with_headers
