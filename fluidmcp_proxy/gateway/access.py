"""Who may come in: checks on a request's headers before anything is done for it. Whose it is, is up to ``keys``."""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

from fluidmcp_proxy.config.settings import Settings
from fluidmcp_proxy.config.sources import ANY, default_port, is_loopback
from fluidmcp_proxy.errors import HeadersTooLarge, HostNotAllowed, InvalidHost, InvalidTarget, OriginNotAllowed
from fluidmcp_proxy.upstream.client import Headers

__all__ = [
    "MAX_HEADERS",
    "MAX_HEADER_BYTES",
    "ServedBy",
    "Sources",
    "check_host",
    "check_size",
    "check_version",
    "sources_of",
]

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


class ServedBy(Enum):
    """Who has put the gateway where requests reach it, and with it, who looks at their Host and Origin unasked."""

    HOST_APP = "host app"
    """The app that it is mounted in, or a test: they do."""
    ASGI_SERVER = "ASGI server"
    """``fluidmcp_proxy:app`` under a server: the gateway looks at the Origin. It does not know what is bound."""
    COMMAND_LINE = "command line"
    """``fluidmcp run``: the gateway looks at the Origin and, bound to loopback, at the Host."""


class Sources:
    """From where requests may come: which Hosts they name, and which sites' pages make them.

    ``hosts`` None: whatever they name. Loopback names always pass: no DNS answer of a foreign site makes a browser
    send one (DNS rebinding). ``origins`` are those that pass besides the page's own site.
    """

    def __init__(self, hosts: Sequence[str] | None, origins: Sequence[str] | None) -> None:
        self._hosts = None if hosts is None or ANY in hosts else tuple(hosts)
        self._origins = None if origins is None else frozenset(origin.encode() for origin in origins)
        self._names = lru_cache(maxsize=256)(self._names_uncached)

    def check(self, host: bytes | None, headers: Headers) -> None:
        """Refuse a request from elsewhere.

        Raises:
            HostNotAllowed: it names another host than those of this gateway.
            OriginNotAllowed: a page of another site made it.
        """
        if self._hosts is not None and (host is None or not self._names(host)):
            raise HostNotAllowed("This gateway does not answer to that Host; allowed_hosts in its configuration does.")
        if self._origins is not None:
            for name, value in headers:
                if name == b"origin" and not (self.lists(value) or _is_own(value, host)):
                    raise OriginNotAllowed("Pages of this origin may not use the gateway; allowed_origins lets them.")

    def lists(self, origin: bytes) -> bool:
        """Whether the configuration allows pages of ``origin``, a site of its own."""
        return self._origins is not None and (origin in self._origins or ANY.encode() in self._origins)

    def _names_uncached(self, host: bytes) -> bool:
        name = _without_port(host.decode("latin-1").lower())
        if is_loopback(name.strip("[]")):
            return True
        return any(
            name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:]))
            for allowed in self._hosts or ()
        )


def sources_of(settings: Settings, served_by: ServedBy) -> Sources | None:
    """What the gateway looks at; None: at neither Host nor Origin."""
    hosts: Sequence[str] | None = settings.allowed_hosts or None
    origins: Sequence[str] | None = settings.allowed_origins or None
    if served_by is ServedBy.COMMAND_LINE and is_loopback(settings.host):
        hosts = settings.allowed_hosts
    if served_by is not ServedBy.HOST_APP:
        origins = settings.allowed_origins
    return None if hosts is None and origins is None else Sources(hosts, origins)


def check_host(headers: Headers, scope: MutableMapping[str, Any]) -> bytes | None:
    """The one well-formed Host that HTTP/1.1 demands (RFC 9112 §3.2) and some servers do not check.

    Raises:
        InvalidHost: none, two, or one that is no host.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (hosts and not _HOST(hosts[0])):
        raise InvalidHost("The request needs exactly one well-formed Host header.")
    if not hosts and scope.get("http_version") == "1.1":
        raise InvalidHost("An HTTP/1.1 request needs a Host header.")
    return hosts[0] if hosts else None


def check_size(headers: Headers) -> None:
    """At most ``MAX_HEADERS`` fields and ``MAX_HEADER_BYTES``.

    Raises:
        HeadersTooLarge: more than that.
    """
    if len(headers) > MAX_HEADERS or sum([len(name) + len(value) for name, value in headers]) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all are accepted.")


def _without_port(host: str) -> str:
    """A Host header's host: what is in brackets has colons, too."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.rstrip(".")


def _is_own(origin: bytes, host: bytes | None) -> bool:
    """Whether a page of ``origin`` came from here: its host and port are those of the Host header.

    Of its scheme nothing is known here: TLS may end before the gateway.
    """
    scheme, separator, authority = origin.lower().partition(b"://")
    if not separator or host is None:
        return False
    port = default_port(scheme.decode("latin-1")).encode()
    return host.lower() in (authority, authority + port)
