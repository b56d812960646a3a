"""Which processes belong to a tree, read from ``/proc``. It signals nobody, but for the kernel's kill of a cgroup.

A tree is known by what its members cannot easily shed: descent from its guardian, the session of its head, and a
marker in the environment they were started with. Linux only; elsewhere nothing is found.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Process", "descendants", "find", "kill_cgroup", "members", "processes", "remove_cgroup", "youngest_first"]


@dataclass(frozen=True, slots=True)
class Process:
    """A living process; ``started`` (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    parent: int
    group: int
    session: int
    started: int


def processes() -> Iterator[Process]:
    """Every process that is no zombie, the youngest first and each read only when it is asked for.

    So one that forks and exits all the time is looked at before it has passed its place on.
    """
    for pid in youngest_first():
        if (process := find(pid)) is not None:
            yield process


def youngest_first() -> list[int]:
    """Every pid."""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        with open("/proc/loadavg", "rb") as file:
            newest = int(file.read().split()[-1])
    except OSError:
        return []
    return by_age(pids, newest)


def by_age(pids: Iterable[int], newest: int) -> list[int]:
    """The youngest first: pids are given out in turn, and from the beginning again after the highest."""
    return sorted(pids, key=lambda pid: (pid <= newest, pid), reverse=True)


def find(pid: int) -> Process | None:
    """The process with that pid, unless there is none or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X") and int(fields[17]) <= 1:  # the main thread may end before the others
        return None
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def descendants(root: int) -> frozenset[int]:
    """The pids below ``root``, without itself."""
    children_of = _children if os.path.exists("/proc/thread-self/children") else _by_parent()
    known: set[int] = set()
    fresh = {root}
    while fresh := {child for pid in fresh for child in children_of(pid)} - known:
        known |= fresh
    return frozenset(known)


def _children(pid: int) -> list[int]:
    """The children of a process, zombies included; cheap, since nothing is read of the machine's other processes."""
    children: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                children += map(int, file.read().split())
    return children


def _by_parent() -> Callable[[int], list[int]]:
    """The same on a kernel without CONFIG_PROC_CHILDREN."""
    children: dict[int, list[int]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process.pid)
    return lambda pid: children.get(pid, [])


def members(head: Process | None, marker: str) -> Iterator[Process]:
    """The processes of the session or group of ``head``, and those that carry ``marker`` in their environment."""
    now = head and find(head.pid)
    if head and now and now.started != head.started:
        head = None  # its number is somebody else's by now, and so is the session of that number
    wanted = marker.encode()
    for process in processes():
        if (head and head.pid in (process.session, process.group)) or wanted in _environment(process.pid):
            yield process


def _environment(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:  # gone, or somebody else's
        return b""


def kill_cgroup(folder: str) -> None:
    """Kill what is in a cgroup that a guardian made for its tree; "" is none."""
    if folder:
        with suppress(OSError), open(os.path.join(folder, "cgroup.kill"), "w") as file:
            file.write("1")


def remove_cgroup(folder: str) -> bool:
    """Remove it; False while a process is in it: one that is ending is known by nothing else any more."""
    if folder:
        try:
            os.rmdir(folder)
        except OSError as error:
            return error.errno != errno.EBUSY
    return True
