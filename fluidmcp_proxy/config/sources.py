"""Where requests may come from: the hosts and the origins that a configuration allows, as they are compared.

Comparing them with a request's headers is done where requests come in.
"""

from __future__ import annotations

import ipaddress
import re

from .faults import refusal

ANY = "*"
"""In either list: all of them."""

_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
_HOST = re.compile(rf"(\*\.)?{_NAME}")
_ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://({_NAME}|\[[0-9a-f:.]+\])(:[0-9]{{1,5}})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def allowed_host(text: str) -> str:
    """A host without a port in lower case, ``*.example.com`` for all names below one, or ``*``; IPv6 in brackets."""
    name = text.lower().rstrip(".")
    if name == ANY or _HOST.fullmatch(name):
        return name
    if name.startswith("[") and name.endswith("]"):
        try:
            return f"[{ipaddress.IPv6Address(name[1:-1])}]"
        except ValueError:
            pass
    raise refusal(
        "is not a host", 'write it without a port: "llm.example.com", "*.example.com", "192.168.1.5", "[::1]"'
    )


def allowed_origin(text: str) -> str:
    """An origin as browsers write it (RFC 6454 §6.2): lower case, without a default port; or ``*``."""
    origin = text.lower().rstrip("/")
    if origin == ANY:
        return origin
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise refusal("is not an origin", 'write it as browsers do: "https://chat.example.com", without a path')
    return origin.removesuffix(default_port(match[1]))


def default_port(scheme: str) -> str:
    """``:80`` or ``:443``, which browsers leave out; nothing for other schemes."""
    return _DEFAULT_PORTS.get(scheme, "")


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address without brackets, is this machine's own, without asking DNS."""
    name = host.lower().rstrip(".")
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
