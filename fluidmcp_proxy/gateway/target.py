"""What a request asks for, read from its scope with suspicion: the path below the mount point, checked.

Everything that two parsers could read in two ways is refused here, so that no later room has to think of it.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from fluidmcp_proxy.errors import InvalidPath, InvalidTarget, UriTooLong

__all__ = ["MAX_TARGET_BYTES", "Target", "read_target"]

MAX_TARGET_BYTES = 16 * 1024
"""Longest path and query: what nginx, h11 and uvicorn allow is of this order."""

# Printable ASCII is all that a request target may have (RFC 9112 §3.2); servers differ in what else they let through.
_PRINTABLE = re.compile(rb"[!-~]*").fullmatch
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})").search
_LIST = b"/v1/models/"
_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE).sub
# Encoded slashes, backslashes and NULs: decoded by some servers before they route, by others after.
_AMBIGUOUS = re.compile(rb"%(?:2f|5c|00)|\\|//", re.IGNORECASE).search
_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}").search


class Target(NamedTuple):
    """A checked request target.

    ``raw`` is the path below the mount point as the client wrote it, ``path`` the same decoded, ``query`` the bytes
    after ``?``, None without one.
    """

    raw: bytes
    path: str
    query: bytes


def read_target(scope: MutableMapping[str, Any]) -> Target:
    """The target of an HTTP or WebSocket scope.

    Raises:
        InvalidTarget: not origin-form (RFC 9112 §3.2.1), or characters that no target may have.
        InvalidPath: dot segments, raw or encoded; encoded slashes, backslashes, NULs; empty segments; escapes inside
            of escapes.
        UriTooLong: over ``MAX_TARGET_BYTES``.
    """
    raw = _raw_path(scope)
    query: bytes = scope.get("query_string", b"")
    if len(raw) + len(query) > MAX_TARGET_BYTES:
        raise UriTooLong(f"The request target is longer than {MAX_TARGET_BYTES} bytes.")
    if not _PRINTABLE(query) or b"#" in query:
        raise InvalidTarget("The query has characters that are not allowed there.")
    below, path = _checked(raw, scope.get("root_path", ""))
    return Target(below, path, query)


@lru_cache(maxsize=256)  # clients ask for the same few paths over and over
def _checked(raw: bytes, root_path: str) -> tuple[bytes, str]:
    """The path below the mount point, as written and decoded."""
    if not raw.startswith(b"/"):
        raise InvalidTarget("The request target must be a path, such as /MODEL/v1/chat/completions.")
    if not _PRINTABLE(raw) or _BAD_ESCAPE(raw) or b"#" in raw:
        raise InvalidTarget("The request target has characters that are not allowed there or a broken % escape.")
    raw = _below_mount(raw, root_path)
    if raw.startswith(_LIST):
        # Names have slashes, which the OpenAI clients encode; and what is asked for here is never forwarded.
        raw = _ENCODED_SLASH(b"/", raw)
    if _AMBIGUOUS(raw):
        raise InvalidPath("The path has an encoded slash, a backslash, a NUL or an empty segment.")
    decoded = unquote_to_bytes(raw)
    if _ESCAPE(decoded):  # a chain of servers may decode twice
        raise InvalidPath("The path is encoded twice.")
    segments = decoded.split(b"/")
    if b"." in segments or b".." in segments:
        raise InvalidPath("The path has dot segments.")
    return raw, decoded.decode("utf-8", "replace")


def _raw_path(scope: MutableMapping[str, Any]) -> bytes:
    raw = scope.get("raw_path")
    if raw is None:  # optional in ASGI
        return quote(scope["path"], safe="/!$&'()*+,;=:@~").encode("ascii")
    assert isinstance(raw, bytes)
    return raw.partition(b"?")[0]  # some servers leave the query in


def _below_mount(raw: bytes, root_path: str) -> bytes:
    """``raw`` without the mount point, which was decoded on its way: as many segments go as that has."""
    depth = root_path.rstrip("/").count("/")
    if depth == 0:
        return raw
    parts = raw.split(b"/", depth + 1)
    mount = unquote_to_bytes(b"/".join(parts[: depth + 1]))
    if mount.decode("utf-8", "replace") != root_path.rstrip("/"):
        # A server that does not put its root_path in front of the path (ASGI allows it).
        return raw
    return b"/" + parts[depth + 1] if len(parts) > depth + 1 else b"/"
