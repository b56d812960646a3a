"""Processes counted from outside: by a marker in the environment that they were started with."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator

from fluidmcp_proxy.process.tree import youngest_first
from tests.serving import STUB, eventually

STUB_COMMAND = [sys.executable, "-S", "-E", str(STUB), "serve", "m"]
GUARDIAN = b"guardian.py"


class Mark:
    """A variable that every process of one test has in its environment, however it was forked."""

    def __init__(self) -> None:
        self.value = secrets.token_hex(8)

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "FAULT_TEST": self.value, **more}

    def pids(self) -> set[int]:
        """Those that are no zombies, which have no environment any more."""
        value = self.value.encode()
        return {pid for pid in youngest_first() if value in content(pid, "environ")}

    def count(self) -> int:
        return len(self.pids())

    def wait_for(self, number: int) -> set[int]:
        """Wait until exactly that many are alive; one look, since they may come and go between two."""
        found: set[int] = eventually(lambda: [pids for pids in [self.pids()] if len(pids) == number], "so many")[0]
        return found

    def kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def content(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def stat(pid: int) -> list[bytes]:
    """The fields of ``/proc/PID/stat`` from the state on; empty if there is no such process."""
    return content(pid, "stat").rpartition(b")")[2].split()


def is_alive(pid: int) -> bool:
    fields = stat(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def guardians(parent: int) -> list[int]:
    """The guardians that ``parent`` has started."""
    found = [pid for pid in youngest_first() if GUARDIAN in content(pid, "cmdline")]
    return [pid for pid in found if (fields := stat(pid)) and int(fields[1]) == parent]


def children(parent: int) -> list[int]:
    """Its children, zombies included."""
    return [pid for pid in youngest_first() if (fields := stat(pid)) and int(fields[1]) == parent]


@contextlib.contextmanager
def marked() -> Iterator[Mark]:
    """A mark, none of whose processes may be left at the end, nor any other child of this one."""
    before = set(children(os.getpid()))
    mark = Mark()
    try:
        yield mark
        left = mark.pids()
        assert not left
        assert set(children(os.getpid())) <= before  # no guardian either, and no zombie
    finally:
        mark.kill()
