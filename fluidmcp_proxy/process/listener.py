"""Who listens on a TCP port of this machine: read from ``/proc``, since connecting would already be talking.

Linux only; elsewhere a port counts as free when it can be bound, and nobody's listener can be told from another's.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

__all__ = [
    "Listener",
    "can_verify",
    "free_port",
    "listeners",
    "owned_inodes",
    "port_is_free",
    "resolve",
    "verified_address",
]

_LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket: its address and the inode that identifies it."""

    host: str
    inode: int


def can_verify() -> bool:
    """Whether this system tells who listens."""
    return sys.platform == "linux"


async def resolve(host: str) -> tuple[str, ...]:
    """The addresses that ``host`` stands for, in the resolver's order; itself if it cannot be resolved."""
    try:
        found = await anyio.to_thread.run_sync(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except OSError:
        return (host,)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


async def port_is_free(host: str, port: int) -> bool:
    """Whether nobody listens on ``port`` of ``host``, wildcards included. TIME_WAIT is free."""
    addresses = await resolve(host)
    if not can_verify():
        return all(_can_bind(address, port) for address in addresses)
    return not any(_reaches(listener.host, addresses) for listener in listeners(port))


def free_port(host: str) -> int:
    """A port that nobody has on ``host`` at this moment. Who is told it may still come second."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def listeners(port: int) -> Iterator[Listener]:
    """Every socket that listens on ``port`` in this network namespace."""
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:  # no IPv6
            continue
        for line in lines:
            fields = line.split()
            address, _, hex_port = fields[1].rpartition(":")
            if fields[3] == _LISTEN and int(hex_port, 16) == port:
                yield Listener(_address(address), int(fields[9]))


def verified_address(port: int, addresses: Iterable[str], pids: Iterable[int]) -> tuple[str | None, bool]:
    """Who is reached on ``port`` at ``addresses``: the first address whose listeners are all sockets of ``pids``.

    The second value is whether there is a listener that is none of theirs at an address that would be used.
    """
    found = list(listeners(port))
    if not found:
        return None, False
    ours = owned_inodes(pids)
    for address in addresses:
        here = [listener for listener in found if _reaches(listener.host, (address,))]
        if here:
            mine = all(listener.inode in ours for listener in here)
            return (address, False) if mine else (None, True)
    return None, False


def owned_inodes(pids: Iterable[int]) -> set[int]:
    """The inodes of the sockets that are open in ``pids``; those of a process that has ended are none."""
    inodes: set[int] = set()
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        try:
            descriptors = os.listdir(folder)
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                link = os.readlink(f"{folder}/{descriptor}")
            except OSError:
                continue
            if link.startswith("socket:["):
                inodes.add(int(link[8:-1]))
    return inodes


def _reaches(listening: str, addresses: Iterable[str]) -> bool:
    """Whether a connection to one of ``addresses`` can end at a socket that listens on ``listening``."""
    bound = _plain(listening)
    for address in addresses:
        try:
            wanted = _plain(address)
        except ValueError:
            continue
        if wanted.is_unspecified:  # connecting to it reaches this machine
            wanted = ipaddress.ip_address("127.0.0.1" if wanted.version == 4 else "::1")
        if bound == wanted or bound == ipaddress.ip_address("::"):  # "::" takes IPv4 too unless it is V6ONLY
            return True
        if bound == ipaddress.ip_address("0.0.0.0") and wanted.version == 4:  # noqa: S104 - compared, not bound
            return True
    return False


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _address(text: str) -> str:
    """An address as ``/proc/net/tcp`` has it: words of 32 bits in the machine's byte order."""
    words = [text[start : start + 8] for start in range(0, len(text), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed))


def _can_bind(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True
