"""Which processes belong to a tree, read from ``/proc``. It signals nobody.

A tree is known by what its members cannot easily shed: descent from its guardian, the session of its head, and a
marker in the environment they were started with. Linux only; elsewhere nothing is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Process", "descendants", "members", "processes"]


@dataclass(frozen=True, slots=True)
class Process:
    """A living process; ``started`` (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    parent: int
    group: int
    session: int
    started: int


def processes() -> Iterator[Process]:
    """Every process that is no zombie."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    for name in names:
        if name.isdigit() and (process := _read(name)) is not None:
            yield process


def descendants(root: int) -> frozenset[int]:
    """The pids below ``root``, without itself."""
    parents = {process.pid: process.parent for process in processes()}
    known = {root}
    while more := {pid for pid, parent in parents.items() if parent in known and pid not in known}:
        known |= more
    return frozenset(known - {root})


def members(head: int | None, marker: str) -> list[Process]:
    """The processes of the session or group of ``head``, and those that carry ``marker`` in their environment."""
    wanted = marker.encode()
    return [
        process
        for process in processes()
        if (head is not None and head in (process.session, process.group)) or wanted in _environment(process.pid)
    ]


def _read(name: str) -> Process | None:
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return Process(int(name), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def _environment(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:  # gone, or somebody else's
        return b""
