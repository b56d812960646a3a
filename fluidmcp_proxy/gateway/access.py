"""Who may come in: checks on a request's headers before anything is done for it."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from itertools import chain
from typing import Any

from fluidmcp_proxy.errors import HeadersTooLarge, InvalidHost, InvalidTarget
from fluidmcp_proxy.upstream.client import Headers

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "check_host", "check_size", "check_version"]

MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
"""Names and values of a request's headers, in all."""

_VERSIONS = frozenset({"1.0", "1.1", "2", "3"})

# RFC 3986 §3.2.2: a registered name, an IPv4 address or an IPv6 address in brackets, and a port.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?").fullmatch


def check_version(scope: MutableMapping[str, Any]) -> None:
    """A version of HTTP that there is; llhttp and h11 take what calls itself HTTP/0.9 or 2.0 for HTTP/1.1.

    Raises:
        InvalidTarget: another one.
    """
    if scope.get("http_version", "1.1") not in _VERSIONS:
        raise InvalidTarget("The request is not one of HTTP/1.1.", headers=[(b"connection", b"close")])


def check_host(headers: Headers, scope: MutableMapping[str, Any]) -> None:
    """One well-formed Host, which HTTP/1.1 demands (RFC 9112 §3.2) and some servers do not check.

    Raises:
        InvalidHost: none, two, or one that is no host.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (hosts and not _HOST(hosts[0])):
        raise InvalidHost("The request needs exactly one well-formed Host header.")
    if not hosts and scope.get("http_version") == "1.1":
        raise InvalidHost("An HTTP/1.1 request needs a Host header.")


def check_size(headers: Headers) -> None:
    """At most ``MAX_HEADERS`` fields and ``MAX_HEADER_BYTES``.

    Raises:
        HeadersTooLarge: more than that.
    """
    if len(headers) > MAX_HEADERS or sum(map(len, chain.from_iterable(headers))) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all are accepted.")
