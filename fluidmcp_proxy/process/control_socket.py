"""The Unix sockets through which the user who runs a gateway talks to it: their paths, and which there are.

A path names the configuration and the gateway's process, since a configuration that launches nothing may be run by
several.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluidmcp_proxy.process.unix_socket import is_free, remove, socket_folder

__all__ = ["control_sockets", "reserved"]


@contextmanager
def reserved(runtime_dir: Path, identity: str) -> Iterator[str]:
    """The path for this process's gateway, with a file of mode 0600 for whoever binds it to take over.

    Removes what gateways that were killed have left of the same configuration, and at the end the file.

    Raises:
        FluidMCPError: the folder cannot be used.
        OSError: the socket cannot be bound.
    """
    folder, stem = _folder(runtime_dir), _stem(identity)
    for left in folder.glob(f"{stem}-*"):
        if is_free(str(left)):
            remove(str(left))
    path = str(folder / f"{stem}-{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as placeholder:
        placeholder.bind(path)
        os.chmod(path, 0o600)
    try:
        yield path
    finally:
        remove(path)


def control_sockets(runtime_dir: Path, identity: str | None = None) -> list[str]:
    """The paths at which a gateway listens, of one configuration or of all.

    Raises:
        FluidMCPError: the folder cannot be used.
    """
    pattern = "*" if identity is None else f"{_stem(identity)}-*"
    return [str(path) for path in sorted(_folder(runtime_dir).glob(pattern)) if not is_free(str(path))]


def _folder(runtime_dir: Path) -> Path:
    return socket_folder(runtime_dir, "control")


def _stem(identity: str) -> str:
    return hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:12]
