"""Ports for servers that are not there yet. Without a dependency, since the end-to-end session has few."""

from __future__ import annotations

import collections
import os
import socket

_KEPT = 100
_reserved: collections.deque[int] = collections.deque()  # file descriptors: an object would be missed at the end


def free_port() -> int:
    """A port that nobody listens on, and that the kernel chooses for nobody else while it is among the last 100.

    A port that is only looked up and let go can be taken before it is used: by a listener of another test process, or
    by a connection that then talks to itself. A bound socket that does not listen keeps both away, and with
    SO_REUSEADDR it leaves the port to whoever names it, which any server does that sets the same option.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    port: int = bound.getsockname()[1]
    _reserved.append(bound.detach())
    if len(_reserved) > _KEPT:
        os.close(_reserved.popleft())
    return port
