"""One gateway per configuration on a machine: a lock that outlives the gateway for as long as its models do.

The lock is an ``flock`` on a file in the runtime folder. Guardians inherit its descriptor, so that it stays taken
until the last tree of processes is gone, however the gateway went; the file says whose it is. Whoever gets the lock
ends what carries its mark still: a gateway and its guardians that were killed together leave it to the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio

from fluidmcp_proxy.errors import FluidMCPError
from fluidmcp_proxy.process.sweep import sweep
from fluidmcp_proxy.process.tree import find, members

__all__ = ["MARKER", "AlreadyOwned", "Ownership", "own", "private_folder"]

MARKER = "FLUIDMCP_INTERNAL_TREE"
"""Variable that marks every process of a tree: the key of the owner, a dot, and a token made anew for each launch."""


_PERIOD = 0.05
_ORPHANS_PATIENCE = 10.0


class AlreadyOwned(FluidMCPError):
    """Another gateway runs this configuration, or a predecessor's models do not end. ``pid`` is the owner's."""

    def __init__(self, identity: str, pid: int | None, *, alive: bool) -> None:
        self.pid = pid
        who = f"the gateway with pid {pid}" if pid else "another gateway"
        if alive:
            problem = f"{who} runs this configuration already ({identity})"
            remedy = "stop it first; one gateway runs a configuration, so serve it with one worker (--workers 1)"
        else:
            problem = f"{who} is gone, but the processes of its models are still being ended ({identity})"
            remedy = "try again when they are gone"
        super().__init__(f"already_running: {problem}; {remedy}")


class Ownership(NamedTuple):
    """The lock's ``descriptor``, for guardians to inherit, and the ``key`` that marks the owner's processes."""

    descriptor: int
    key: str


@asynccontextmanager
async def own(identity: str, runtime_dir: Path, patience: float) -> AsyncIterator[Ownership]:
    """Hold the lock on a configuration.

    Waits up to ``patience`` seconds for the models of an owner that is gone itself.

    Raises:
        AlreadyOwned: the owner is alive, or its models outlast the patience.
        FluidMCPError: the runtime folder cannot be used.
    """
    name = _digest(identity) + ".lock"
    descriptor = _open(runtime_dir, name)
    key = _digest(os.path.join(os.path.realpath(runtime_dir), name))  # noqa: ASYNC240 - no slower than opening it
    try:
        await _lock(descriptor, identity, patience)
        await _end_orphans(identity, f"{MARKER}={key}.", descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {_started(os.getpid())}\n{identity}\n".encode("utf-8", "replace"), 0)
        yield Ownership(descriptor, key)
        # Every tree is gone. Said, since a process that the host has forked may hold a copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        # The file stays: removing it could leave two gateways with a lock on two files of one name.
        os.close(descriptor)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24]


async def _lock(descriptor: int, identity: str, patience: float) -> None:
    deadline = anyio.current_time() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pid, alive = _owner(descriptor)
            if alive or anyio.current_time() >= deadline:
                raise AlreadyOwned(identity, pid, alive=alive) from None
        await anyio.sleep(_PERIOD)


async def _end_orphans(identity: str, mark: str, descriptor: int) -> None:
    """Kill what a gateway has left that was killed together with its guardians."""
    if any(members(None, mark)):
        with anyio.move_on_after(_ORPHANS_PATIENCE) as limit:
            await sweep(None, mark)
        if limit.cancelled_caught:
            raise AlreadyOwned(identity, _owner(descriptor)[0], alive=False)


def _owner(descriptor: int) -> tuple[int | None, bool]:
    """The pid in the file, and whether that process still is the one that wrote it."""
    pid, _, started = os.pread(descriptor, 64, 0).partition(b"\n")[0].partition(b" ")
    if not pid.isdigit():
        return None, False
    return int(pid), _is_alive(int(pid)) and started.decode("ascii", "replace") == _started(int(pid))


def _started(pid: int) -> str:
    """What tells a process from a later one with the same pid; nothing where the system does not say."""
    process = find(pid)
    return "" if process is None else str(process.started)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return find(pid) is not None or sys.platform != "linux"  # a zombie is not alive


def _open(runtime_dir: Path, name: str) -> int:
    """The file of the lock, opened."""
    path = private_folder(runtime_dir) / name
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise FluidMCPError(f"{path} cannot be opened: {error.strerror}; set FLUIDMCP_RUNTIME_DIR") from error


def private_folder(folder: Path) -> Path:
    """Make the folder, private to this user: in a shared temporary directory somebody else may have made it before us.

    Raises:
        FluidMCPError: it cannot be made, or is somebody else's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError as error:
        raise FluidMCPError(
            f"runtime_dir {folder} cannot be made: {error.strerror}; set FLUIDMCP_RUNTIME_DIR"
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise FluidMCPError(f"runtime_dir {folder} is not a folder of yours; set FLUIDMCP_RUNTIME_DIR to one that is")
    if info.st_mode & 0o022:
        folder.chmod(0o700)
    return folder
