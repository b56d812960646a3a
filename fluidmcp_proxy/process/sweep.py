"""Killing what no guardian will end: its own was killed, or left with the gateway that had started it."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import ExitStack, suppress

import anyio

from fluidmcp_proxy.process import tree

__all__ = ["sweep"]

_PERIOD = 0.02
_QUIET_LOOKS = 5
_CGROUP_PATIENCE = 2.0


async def sweep(head: tree.Process | None, marker: str, cgroup: str = "") -> None:
    """Kill the processes of the session of ``head``, those that carry ``marker``, and what is in ``cgroup``.

    Returns when several looks in a row have found none: one proves nothing, since what was being forked, or a storm
    that forks and exits, was not in the list yet.
    """
    tree.kill_cgroup(cgroup)
    quiet = 0
    while quiet < _QUIET_LOOKS:
        quiet += 1
        for process in tree.members(head, marker):
            _kill(process)
            quiet = 0
        await anyio.sleep(_PERIOD)
    with anyio.move_on_after(_CGROUP_PATIENCE):
        while not tree.remove_cgroup(cgroup):  # noqa: ASYNC110 - no event
            await anyio.sleep(_PERIOD)


def _kill(process: tree.Process) -> None:
    """SIGKILL to this process, not to a later one with its pid: a pidfd stays with what it was opened for."""
    with suppress(OSError), ExitStack() as stack:
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return
            descriptor = -1  # before Linux 5.3, or forbidden
        else:
            stack.callback(os.close, descriptor)
        now = tree.find(process.pid)
        if now is None or now.started != process.started:
            return
        if descriptor >= 0:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
