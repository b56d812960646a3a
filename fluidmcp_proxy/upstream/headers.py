"""Which headers cross the gateway, in both directions: pure functions on lists of byte pairs.

Strip first, set afterwards, so that nobody but the gateway says what the gateway says. Names are in lower case, as ASGI
has them. How long a body is, is not decided here but in ``framing``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

__all__ = ["pick_request_id", "request_headers", "response_headers"]

Pairs = Iterable[tuple[bytes, bytes]]

# RFC 9110 §7.6.1 and, for the last three, what was once sent in their place.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"keep-alive",
        b"proxy-connection",
        b"http2-settings",
    }
)
# Only the gateway says these. `Expect` ends here: whoever reads the client's body has answered it (RFC 9110 §10.1.1).
_GATEWAY_OWNED = frozenset({b"host", b"forwarded", b"x-real-ip", b"x-request-id", b"expect"})

_NOT_ANSWERED = _HOP_BY_HOP | {b"x-request-id"}
_AUTHORIZATION = (b"authorization",)
_NOTHING: frozenset[bytes] = frozenset()

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}").fullmatch
_PSEUDONYM = b"fluidmcp"


def pick_request_id(headers: Pairs) -> bytes:
    """Return the client's ``x-request-id`` if there is one, of 1–128 of ``[A-Za-z0-9._-]``; else a new one."""
    found = [value for name, value in headers if name == b"x-request-id"]
    if len(found) == 1 and _REQUEST_ID(found[0]):
        return found[0]
    return b"%032x" % random.getrandbits(128)


def request_headers(
    headers: Pairs,
    *,
    host: bytes,
    client: str | None,
    scheme: str,
    drop: Collection[bytes] = (),
    request_id: bytes,
    authorization: bytes | None = None,
    http_version: str = "1.1",
) -> list[tuple[bytes, bytes]]:
    """Return what the model's server gets of a client's ``headers``.

    ``host`` is the server's (``Address.authority``), ``client`` the client's address, ``scheme`` what it spoke to us;
    ``drop`` are further names that stay here (the header with the gateway's own key). ``authorization``, a whole value
    such as ``b"Bearer …"``, replaces the client's. ``http_version`` is the client's, for ``Via`` (RFC 9110 §7.6.3).
    """
    pairs = headers if isinstance(headers, list) else list(headers)
    gone = _nominated(pairs)
    if drop or authorization is not None:
        gone = gone.union(drop, () if authorization is None else _AUTHORIZATION)
    kept = [(b"host", host)]
    asked_host: bytes | None = None
    for pair in pairs:
        name = pair[0]
        if name == b"host":
            asked_host = pair[1]
        elif name not in gone and _crosses(name):
            kept.append(pair)
    if authorization is not None:
        kept.append((b"authorization", authorization))
    kept += _forwarded(client, scheme, http_version)
    if asked_host is not None:
        kept.append((b"x-forwarded-host", asked_host))
    kept.append((b"x-request-id", request_id))
    return kept


def response_headers(headers: Pairs, *, request_id: bytes) -> list[tuple[bytes, bytes]]:
    """Return what the client gets of the server's ``headers``: order and repetition kept, ours last.

    No ``Via`` is added: RFC 9110 §7.6.3 demands it of a gateway for requests and leaves it open for responses, and an
    answer shall be the server's own. What the server says about a request id gives way to ours.
    """
    pairs = headers if isinstance(headers, list) else list(headers)
    gone = _nominated(pairs) | _NOT_ANSWERED
    kept = [pair for pair in pairs if pair[0] not in gone]
    kept.append((b"x-request-id", request_id))
    return kept


@lru_cache(maxsize=1024)  # a client says the same with each request
def _forwarded(client: str | None, scheme: str, http_version: str) -> Sequence[tuple[bytes, bytes]]:
    """What the gateway says of where a request comes from."""
    said = [] if client is None else [(b"x-forwarded-for", client.encode("ascii", "replace"))]
    said.append((b"x-forwarded-proto", scheme.encode("ascii", "replace")))
    said.append((b"via", b"%b %b" % (http_version.encode("ascii", "replace"), _PSEUDONYM)))
    return tuple(said)


def _nominated(pairs: Pairs) -> frozenset[bytes]:
    """The names that ``Connection`` lists: meant for this hop only."""
    values = [value for name, value in pairs if name == b"connection"]
    if not values:
        return _NOTHING
    return frozenset(token.strip(b" \t").lower() for value in values for token in value.split(b","))


@lru_cache(maxsize=1024)
def _crosses(name: bytes) -> bool:
    """Whether a request header may be forwarded by its name alone.

    One with an underscore may not: CGI-like servers cannot tell ``x_forwarded_for`` from ``x-forwarded-for``.
    """
    return (
        b"_" not in name
        and name not in _HOP_BY_HOP
        and name not in _GATEWAY_OWNED
        and not name.startswith(b"x-forwarded-")
    )
