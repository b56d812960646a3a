"""A program and everything that descends from it, as a scope: leaving it leaves nothing.

The program is started by a guardian (``guardian.py``), which ends the tree when this scope is left and when the
gateway goes without leaving it. Should the guardian be killed or hang, the scope ends the tree itself.

Order on leaving, shielded from cancellation: the guardian is told → SIGTERM and SIGCONT → ``stop_timeout``
→ SIGKILL until the tree is empty → the guardian exits → what was written is drained.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from fluidmcp_proxy.errors import FluidMCPError, ungrouped
from fluidmcp_proxy.process import tree
from fluidmcp_proxy.process.guard import Guard
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import MARKER, Ownership
from fluidmcp_proxy.process.sweep import sweep

__all__ = ["MARKER", "CommandError", "ExitStatus", "NoProcess", "ProcessGroup", "open_process_group"]

logger = logging.getLogger("fluidmcp_proxy.process")

_DRAIN_PATIENCE = 2.0
_PATIENCE = 2.0


class CommandError(FluidMCPError):
    """The command cannot be run at all: not found, not executable, not a program."""


class NoProcess(FluidMCPError):
    """The machine has no room for another process, or this one no descriptor left; that may pass."""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: an exit ``code``, or a ``signal`` number, or neither when nobody was there to see it."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        """A phrase: ``exited with code 1``, ``was killed by SIGKILL``."""
        if self.code is not None:
            return f"exited with code {self.code}"
        if self.signal is None:
            return "was lost: its guardian has ended"
        try:
            return f"was killed by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"was killed by signal {self.signal}"


class ProcessGroup:
    """The running tree. ``pid`` is its head's."""

    def __init__(self, guard: Guard, marker: str) -> None:
        self.pid = 0
        self._guard = guard
        self._marker = marker
        self._head: tree.Process | None = None
        self._started = anyio.Event()
        self._exited = anyio.Event()
        self._over = anyio.Event()  # the guardian will say nothing more
        self._status = ExitStatus()
        self._exec_errno = 0
        self._is_empty = False
        self._cgroup = ""

    def __repr__(self) -> str:
        state = self._status if self._exited.is_set() else "running"
        return f"<ProcessGroup pid={self.pid} {state}>"

    async def wait(self) -> ExitStatus:
        """Return when the head has ended, however; the others of the tree may be there still."""
        await self._exited.wait()
        return self._status

    def pids(self) -> frozenset[int]:
        """The processes of the tree now."""
        return tree.descendants(self._guard.pid)

    async def _attend(self, output: Output, until: anyio.CancelScope) -> None:
        """Read what the guardian and its tree write; to the end, also when all around is being cancelled."""
        with until:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen)
                tasks.start_soon(output.drain, self._guard.output)

    async def _listen(self) -> None:
        """Take the guardian's reports until it is gone."""
        rest = b""
        try:
            while True:
                *lines, rest = (rest + await self._guard.reports.receive()).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        except anyio.EndOfStream:
            pass
        finally:  # also when the event loop is torn down
            self._started.set()
            self._exited.set()
            self._over.set()

    def _take(self, report: dict[str, Any]) -> None:
        if "pid" in report:
            self.pid, self._cgroup = report["pid"], report["cgroup"]
            self._head = tree.find(self.pid)
            self._started.set()
        elif "errno" in report:
            self._exec_errno = report["errno"]
            self._started.set()
        elif "exit" in report:
            code = os.waitstatus_to_exitcode(report["exit"])
            self._status = ExitStatus(code=code) if code >= 0 else ExitStatus(signal=-code)
            self._exited.set()
        elif "empty" in report:
            self._is_empty = True

    async def _end(self, stop_timeout: float) -> None:
        """Have the guardian end the tree and go; do it here if the guardian is gone already, or hangs."""
        self._guard.dismiss()
        with anyio.move_on_after(stop_timeout + _PATIENCE) as patience:
            await self._guard.gone()
        if patience.cancelled_caught:
            logger.warning("the processes of %s have not ended in time; killing them from here", self.pid)
            self._guard.kill()
            await self._guard.gone()
        with anyio.move_on_after(_DRAIN_PATIENCE):
            await self._over.wait()  # what it said last may not have been read yet
        if not self._is_empty:
            await sweep(self._head, self._marker, self._cgroup)


@asynccontextmanager
async def open_process_group(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    stop_timeout: float,
    output: Output,
    owner: Ownership | None = None,
) -> AsyncIterator[ProcessGroup]:
    """Run ``argv`` as the head of a new session with ``env`` as its whole environment; leaving ends its whole tree.

    Standard output and standard error go to ``output``. ``stop_timeout`` is the grace in seconds between SIGTERM and
    SIGKILL. The guardian holds on to the ``owner``'s lock until the tree is gone.

    Raises:
        CommandError: the command cannot be run.
        NoProcess: no process can be made now.
    """
    program = find_program(argv[0], env)
    if any("\0" in text for text in argv):
        raise CommandError(f"command '{argv[0]}' cannot be run: there is a null character in its arguments")
    token = secrets.token_hex(16)
    mark = f"{owner.key}.{token}" if owner else token
    env = {**env, MARKER: mark}
    try:
        guard = Guard(env, owner.descriptor if owner else None)
    except OSError as error:
        raise NoProcess(f"no process can be made: {error.strerror}") from error
    group = ProcessGroup(guard, f"{MARKER}={mark}")
    try:
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                attendance = anyio.CancelScope(shield=True)
                tasks.start_soon(group._attend, output, attendance)
                try:
                    await guard.send(_order(program, argv, env, stop_timeout))
                    await group._started.wait()
                    if group._exec_errno:
                        raise _cannot_exec(argv[0], group._exec_errno)
                    yield group
                finally:
                    with anyio.CancelScope(shield=True):
                        await group._end(stop_timeout)
                        with anyio.move_on_after(_DRAIN_PATIENCE):
                            await output.drained()
                    attendance.cancel()
    finally:
        guard.dismiss()
        guard.close()


def find_program(command: str, env: Mapping[str, str]) -> str:
    """The path of ``command``: as a shell would find it with the PATH of ``env``.

    Raises:
        CommandError: there is none, or it is not executable.
    """
    if "/" in command:
        path = os.path.abspath(command)
        if not os.path.exists(path):
            raise CommandError(f"command '{command}' does not exist; write the path of a program")
        if os.path.isdir(path) or not os.access(path, os.X_OK):
            raise CommandError(f"command '{command}' is not executable; chmod +x it, or write another path")
        return path
    found = shutil.which(command, path=env.get("PATH", os.defpath))
    if found is None:
        hint = "install it (pip install vllm)" if command == "vllm" else "install it"
        raise CommandError(f"command '{command}' not found on PATH; {hint} or write its path")
    return os.path.abspath(found)


def _order(program: str, argv: Sequence[str], env: Mapping[str, str], stop_timeout: float) -> bytes:
    """A line for the guardian; bytes as the system has them, each as one character, since its locale may differ."""

    def exact(text: str) -> str:
        return os.fsencode(text).decode("latin-1")

    order = {
        "program": exact(program),
        "argv": [exact(text) for text in argv],
        "env": {exact(name): exact(value) for name, value in env.items()},
        "stop_timeout": stop_timeout,
    }
    return json.dumps(order).encode() + b"\n"


def _cannot_exec(command: str, code: int) -> CommandError:
    hints = {
        errno.ENOEXEC: "; a script needs a first line like #!/bin/sh",
        errno.ENOENT: "; the interpreter that its first line names is missing",
    }
    return CommandError(f"command '{command}' cannot be run: {os.strerror(code)}{hints.get(code, '')}")
