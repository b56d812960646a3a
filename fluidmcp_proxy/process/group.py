"""A program and everything that descends from it, as a scope: leaving it leaves nothing.

The program is started by a guardian (``guardian.py``), which ends the tree when this scope is left and when the
gateway goes without leaving it. Should the guardian be killed, the scope ends the tree itself.

Order on leaving, shielded from cancellation: the guardian's input is closed → SIGTERM and SIGCONT → ``stop_timeout``
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
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import ByteReceiveStream, Process

from fluidmcp_proxy.errors import FluidMCPError, ungrouped
from fluidmcp_proxy.process import tree
from fluidmcp_proxy.process.output import Output

__all__ = ["MARKER", "CommandError", "ExitStatus", "ProcessGroup", "open_process_group"]

logger = logging.getLogger("fluidmcp_proxy.process")

MARKER = "FLUIDMCP_INTERNAL_TREE"
"""Variable whose value, made anew for each launch, marks every process of a tree."""

_GUARDIAN = Path(__file__).with_name("guardian.py")
_SWEEP_PERIOD = 0.02
_DRAIN_PATIENCE = 2.0
_PATIENCE = 5.0


class CommandError(FluidMCPError):
    """The command cannot be run at all: not found, not executable, not a program."""


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
            return "was lost: its guardian was killed"
        try:
            return f"was killed by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"was killed by signal {self.signal}"


class ProcessGroup:
    """The running tree. ``pid`` is its head's."""

    def __init__(self, guardian: Process, marker: str) -> None:
        self.pid = 0
        self._guardian = guardian
        self._marker = marker
        self._started = anyio.Event()
        self._exited = anyio.Event()
        self._status = ExitStatus()
        self._exec_errno = 0
        self._is_empty = False

    def __repr__(self) -> str:
        state = self._status if self._exited.is_set() else "running"
        return f"<ProcessGroup pid={self.pid} {state}>"

    async def wait(self) -> ExitStatus:
        """Return when the head has ended, however; the others of the tree may be there still."""
        await self._exited.wait()
        return self._status

    def pids(self) -> frozenset[int]:
        """The processes of the tree now."""
        return tree.descendants(self._guardian.pid)

    async def _listen(self, reports: ByteReceiveStream) -> None:
        """Take the guardian's reports until it is gone."""
        rest = b""
        try:
            async for data in reports:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        self._started.set()
        self._exited.set()

    def _take(self, report: dict[str, int]) -> None:
        if "pid" in report:
            self.pid = report["pid"]
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
        """Have the guardian end the tree and go; do it here if the guardian is gone already."""
        guardian = self._guardian
        assert guardian.stdin is not None
        await guardian.stdin.aclose()
        with anyio.move_on_after(stop_timeout + _PATIENCE) as patience:
            await guardian.wait()
        if patience.cancelled_caught:
            logger.warning("the processes of %s do not end even when killed; waiting", self.pid)
            await guardian.wait()
        if not self._is_empty:
            await self._sweep()

    async def _sweep(self) -> None:
        """Kill what a guardian that did not finish has left, until a look finds nothing."""
        head = self.pid or None
        while left := tree.members(head, self._marker):
            for process in left:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            await anyio.sleep(_SWEEP_PERIOD)


@asynccontextmanager
async def open_process_group(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    stop_timeout: float,
    output: Output,
    lock_fd: int | None = None,
    name: str = "",
) -> AsyncIterator[ProcessGroup]:
    """Run ``argv`` as the head of a new session with ``env`` as its whole environment; leaving ends its whole tree.

    Standard output and standard error go to ``output``. ``stop_timeout`` is the grace in seconds between SIGTERM and
    SIGKILL. ``lock_fd`` is inherited by the guardian, so that a lock on it is held until the tree is gone.

    Raises:
        CommandError: the command cannot be run.
    """
    program = find_program(argv[0], env)
    marker = f"{MARKER}={secrets.token_hex(16)}"
    guardian = await _start_guardian(env, marker, lock_fd)
    group = ProcessGroup(guardian, marker)
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    assert guardian.stderr is not None
    order = {"program": program, "argv": list(argv), "env": _marked(env, marker), "stop_timeout": stop_timeout}
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(group._listen, guardian.stdout)
            tasks.start_soon(output.drain, guardian.stderr)
            try:
                try:
                    await guardian.stdin.send(json.dumps(order).encode() + b"\n")
                except anyio.BrokenResourceError:
                    pass  # it is gone, and that will be seen
                await group._started.wait()
                if group._exec_errno:
                    raise _cannot_exec(argv[0], group._exec_errno)
                yield group
            finally:
                with anyio.CancelScope(shield=True):
                    await group._end(stop_timeout)
                    with anyio.move_on_after(_DRAIN_PATIENCE):
                        await output.drained()
                    await guardian.aclose()
                tasks.cancel_scope.cancel()


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


async def _start_guardian(env: Mapping[str, str], marker: str, lock_fd: int | None) -> Process:
    """Start the guardian; shielded, since a spawn that is half cancelled would be nobody's."""
    name, _, value = marker.partition("=")
    own = {key: env[key] for key in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if key in env}
    with anyio.CancelScope(shield=True):
        guardian = await anyio.open_process(
            [sys.executable, "-I", "-S", str(_GUARDIAN)],
            env={**own, name: value},
            start_new_session=True,
            pass_fds=() if lock_fd is None else (lock_fd,),
        )
    return guardian  # noqa: RET504 - a return inside the scope would hide that it may not happen


def _marked(env: Mapping[str, str], marker: str) -> dict[str, str]:
    name, _, value = marker.partition("=")
    return {**env, name: value}


def _cannot_exec(command: str, code: int) -> CommandError:
    hints = {
        errno.ENOEXEC: "; a script needs a first line like #!/bin/sh",
        errno.ENOENT: "; the interpreter that its first line names is missing",
    }
    return CommandError(f"command '{command}' cannot be run: {os.strerror(code)}{hints.get(code, '')}")
