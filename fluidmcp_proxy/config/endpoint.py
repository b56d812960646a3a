"""Where a model's server listens: the meaning of a ``base_url``.

It resolves no name and opens no connection.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from fluidmcp_proxy.errors import ConfigError

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})?)*\.?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*")
_ONE_ROUTE = re.compile(r"/v1/(chat/completions|completions|embeddings|responses|messages|models)$")
_EXAMPLE = "write it like http://localhost:8001/v1"
LONGEST_SOCKET = 103
"""Bytes of a Unix socket's path: ``sun_path`` holds 108 on Linux and 104 on macOS, the NUL included."""
LOOPBACK = "loopback"
"""The host of :attr:`Endpoint.address` that stands for localhost, 127.0.0.1, ::1 and the wildcards."""


class Endpoint(BaseModel):
    """The address of a server that speaks the OpenAI API, taken apart."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base_url: str = Field(description="The address as it was written, or as derived from the arguments.")
    scheme: Literal["http", "https"]
    host: str = Field(description="A name or an IP address, without the brackets of IPv6, in lower case.")
    port: int = Field(ge=1, le=65535)
    root: str = Field(default="", description="The path before /v1, without a final slash: '' or '/api'.")
    uds: str | None = Field(default=None, description="The Unix socket that is connected to instead of host and port.")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port such that two endpoints on one listener compare equal, as far as that shows without DNS."""
        if self.uds is not None:
            return f"unix:{os.path.normpath(self.uds)}", 0
        return canonical_host(self.host), self.port


def canonical_host(host: str) -> str:
    """``loopback`` for every way to write this machine's loopback or wildcard address, else the normalised host."""
    name = host.lower().rstrip(".")
    if name == "localhost":
        return LOOPBACK
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if str(address) in ("127.0.0.1", "::1") or address.is_unspecified:
        return LOOPBACK
    return str(address)


def local_endpoint(host: str | None, port: int) -> Endpoint:
    """The endpoint of a server that was told ``--host`` and ``--port``; a wildcard is reached through loopback."""
    name = (host or "").strip("[]").lower()
    if name in ("", "0.0.0.0", "localhost"):  # noqa: S104 - compared, not bound
        name = "127.0.0.1"
    elif name == "::":
        name = "::1"
    written = f"[{name}]" if ":" in name else name
    return parse_base_url(f"http://{written}:{port}/v1")


def unix_endpoint(path: str) -> Endpoint:
    """The endpoint of a server that was told ``--uds``; its Host header names localhost."""
    return Endpoint(base_url="http://localhost/v1", scheme="http", host="localhost", port=80, uds=path)


def parse_base_url(url: str) -> Endpoint:
    """Take ``http[s]://host[:port][/path][/v1][/]`` apart.

    Raises ``ConfigError("invalid_base_url")`` without a path, and without the URL: it may hold a password.
    """
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise _invalid("has spaces, backslashes or characters that are not ASCII")
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        raise _invalid("must begin with http:// or https://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _invalid("its host or port cannot be understood") from None
    if "@" in parts.netloc:
        raise _invalid("has a user name or password in it", "put the key into api_key")
    if "?" in url or "#" in url:
        raise _invalid("has a query or a fragment")
    _check_host(host, bracketed="[" in parts.netloc)
    if port == 0 or parts.netloc.endswith(":"):
        raise _invalid("its port must be between 1 and 65535")
    name = cast(Literal["http", "https"], scheme.lower())
    return Endpoint(
        base_url=url, scheme=name, host=host, port=port or (443 if name == "https" else 80), root=_root(parts.path)
    )


def _check_host(host: str, *, bracketed: bool) -> None:
    if bracketed:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _invalid("the address in brackets is not an IPv6 address") from None
        if "%" in host:
            raise _invalid("an IPv6 zone cannot be used")
        return
    if not _HOST_NAME.fullmatch(host):
        raise _invalid("its host is missing or not a host name", _EXAMPLE)
    # The URL standard's "ends in a number" rule: 127.1 and 0x7f000001 are addresses to some resolvers.
    if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise _invalid("its host is not an IPv4 address", "write four numbers from 0 to 255") from None


def _root(path: str) -> str:
    if _ONE_ROUTE.search(path.rstrip("/")):
        raise _invalid("is the address of one route", "end it with /v1")
    trimmed = path.rstrip("/")
    segments = trimmed.split("/")
    if not _PATH.fullmatch(trimmed) or "." in segments or ".." in segments or re.search("%(2e|2f|5c|00)", path, re.I):
        raise _invalid("its path has empty, dot or unsafe segments")
    return trimmed.removesuffix("/v1")


def _invalid(problem: str, remedy: str = _EXAMPLE) -> ConfigError:
    return ConfigError("invalid_base_url", problem, remedy=remedy)
