"""Unix sockets of servers: a private path for one launch, whether a path is free, and who listens there.

A server leaves its socket's file behind, and none can bind where a file is: whoever starts one clears the path first.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from fluidmcp_proxy.config.endpoint import LONGEST_SOCKET
from fluidmcp_proxy.process.listener import owned_inodes
from fluidmcp_proxy.process.owner import private_folder

__all__ = ["is_free", "private_path", "remove", "socket_folder", "verified"]

_ACCEPTS = 0x10000  # __SO_ACCEPTCON, include/uapi/linux/net.h


def private_path(runtime_dir: Path, of: str) -> str:
    """A path for one launch of the server that ``of`` names, in a folder that only this user may enter.

    It is new each time, so that nothing can be mistaken for what listened at an earlier one; what a gateway that was
    killed has left of the same server is removed.

    Raises:
        FluidMCPError: the folder cannot be used.
    """
    stem = hashlib.sha256(of.encode("utf-8", "replace")).hexdigest()[:12]
    folder = socket_folder(runtime_dir, "sockets")
    for left in folder.glob(f"{stem}-*"):
        remove(str(left))
    return str(folder / f"{stem}-{secrets.token_hex(4)}")


def socket_folder(runtime_dir: Path, name: str) -> Path:
    """A private folder where paths are short enough: in the runtime folder, else in one of the user below ``/tmp``.

    Raises:
        FluidMCPError: it cannot be used.
    """
    folder = runtime_dir / name
    if len(os.fsencode(folder)) + 22 > LONGEST_SOCKET:
        folder = Path("/tmp", f"fluidmcp-{os.getuid()}", name)  # noqa: S108 - private_folder() looks whose it is
    private_folder(folder.parent)
    private_folder(folder)
    folder.chmod(0o700)
    return folder


def is_free(path: str) -> bool:
    """Whether a server could be started at ``path``: there is nothing, or a socket at which nobody accepts.

    Asked by connecting, since a server of another network namespace, a container's, is in no table here.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return True
        except ConnectionRefusedError:
            return _is_socket(path)
        except OSError:
            pass
        return False


def remove(path: str) -> None:
    """Remove the socket at ``path``, if there is one; nothing else is ever removed."""
    with suppress(OSError):
        if _is_socket(path):
            os.unlink(path)


def verified(path: str, pids: Iterable[int]) -> tuple[bool, bool]:
    """Who listens at ``path``: the processes ``pids`` and nobody else; or somebody who is none of them."""
    found = list(_inodes(path))
    if not found:
        return False, False
    ours = owned_inodes(pids)
    mine = all(inode in ours for inode in found)
    return mine, not mine


def _inodes(path: str) -> Iterator[int]:
    """The sockets that listen and were bound to ``path``, written as it was for ``bind()``."""
    lines = Path("/proc/self/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    for line in lines:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & _ACCEPTS:
            yield int(fields[6])


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False
