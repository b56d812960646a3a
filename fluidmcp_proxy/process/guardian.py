"""Stand-alone program between the gateway and one model's server: outlives a killed gateway, takes the tree with it.

Run as ``python -I -S guardian.py PID``; standard library only, single-threaded, in a session of its own. It becomes the
subreaper of everything below it, so that a grandchild which made its own session or lost its parent is its child again,
and "no child left" (``waitpid`` says ECHILD) means that the tree is empty.

* Its only argument: the pid of the gateway, whose end, however it comes, is the end of the tree.
* fd 0: one line of JSON ``{"program", "argv", "env", "stop_timeout"}``; then another line or the end of file asks for
  the end of the tree.
* fd 1: lines of JSON: ``{"pid", "cgroup"}`` or ``{"errno"}`` when the head has been started or could not be,
  ``{"exit"}`` (a wait status) when it has ended, ``{"empty": true}`` when nothing is left. The guardian exits last.
* fd 2: becomes the head's standard output and standard error; the guardian writes nothing there.

The end of the tree: SIGTERM and SIGCONT once to every process, ``stop_timeout`` seconds of grace, then SIGKILL until
it is empty. The same, with a second of grace, when the head ends by itself and leaves others behind. Everything
inherited beyond fd 2 (the lock of the configuration) is kept open until the guardian exits and is closed in the head.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes longer to import than all the rest
    from collections.abc import Callable
    from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
ON_LINUX = sys.platform == "linux"
IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2")
POLL = 0.02
"""Seconds between two looks at a tree that is ending."""
RESCAN = 0.25  # the same for members that appear during the grace
ORPHANS_GRACE = 1.0
"""Longest grace in seconds for what a head that ended by itself has left: nobody can shut it down in order any more."""


class Tree:
    """The head and everything that descends from it."""

    def __init__(self) -> None:
        self.head = 0
        self.head_is_gone = False
        self.is_empty = False
        self.cgroup = make_cgroup() if ON_LINUX else ""

    def start(self, program: bytes, argv: list[bytes], env: dict[bytes, bytes]) -> int:
        """Fork and exec the head; returns the errno of a failed exec, else 0."""
        reader, writer = os.pipe()
        parent = os.getpid()
        self.head = os.fork()
        if self.head == 0:
            code = errno.EINVAL  # a name or a value that cannot be in an environment
            try:
                os.close(reader)
                if self.cgroup:
                    write(self.cgroup, "cgroup.procs", b"0")
                become_head(parent, writer)
                os.execve(program, argv, env)  # noqa: S606 - no shell, on purpose
            except OSError as error:
                code = error.errno or code
            finally:
                os.write(writer, b"%d" % code)
                os._exit(127)
        os.close(writer)
        with os.fdopen(reader, "rb") as failure:
            return int(failure.read() or b"0")

    def reap(self) -> None:
        """Bury the dead; learn of the head's end and of the tree's."""
        while not self.is_empty:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.is_empty = True
                break
            if pid == 0:
                break
            if pid == self.head:
                self.head_is_gone = True
                report(exit=status)
        if self.is_empty and not ON_LINUX:  # without a subreaper, only the group is known
            with contextlib.suppress(OSError):
                os.killpg(self.head, 0)
                self.is_empty = False

    def members(self) -> set[int]:
        """The descendants of this process, zombies included, and on other systems than Linux only the group's head."""
        if not ON_LINUX:
            return {self.head}
        children_of = children if os.path.exists("/proc/thread-self/children") else by_parent()
        known: set[int] = set()
        fresh = {os.getpid()}
        while fresh := {child for pid in fresh for child in children_of(pid)} - known:
            known |= fresh
        return known

    def signal(self, number: int) -> None:
        """Send a signal to every member; in the group at once, since that leaves no time to fork out of it."""
        if not self.head_is_gone or not ON_LINUX:
            # The number of a group lives while one process is in it; ours as long as the head is not reaped.
            with contextlib.suppress(OSError):
                os.killpg(self.head, number)
        for pid in self.members():
            with contextlib.suppress(OSError):
                if self.head_is_gone or os.getpgid(pid) != self.head:
                    os.kill(pid, number)

    def tell(self, told: set[int]) -> set[int]:
        """SIGTERM and SIGCONT to the members that appeared since: vLLM forks workers while it is being told to end."""
        fresh = self.members() - told
        for number in (signal.SIGTERM, signal.SIGCONT):
            for pid in fresh:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        return fresh

    def kill(self) -> None:
        """SIGKILL to everything, frozen first so that nobody forks while the others are killed."""
        frozen: set[int] = set()
        for _ in range(20):
            fresh = self.members() - frozen
            if not fresh:
                break
            for pid in fresh:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
            frozen |= fresh
        if self.cgroup:
            write(self.cgroup, "cgroup.kill", b"1")
        self.signal(signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The children of a process; quick enough to catch up with one that forks and exits all the time."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def by_parent() -> Callable[[int], list[int]]:
    """The same on a kernel without CONFIG_PROC_CHILDREN."""
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            found.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    return lambda pid: found.get(pid, [])


def make_cgroup() -> str:
    """A new child of this process's own cgroup (v2) for the tree alone, to kill it with one write; "" if none can be
    made.

    Only root, or a service that was delegated its cgroup, can make one; everything else here does without.
    """
    with contextlib.suppress(OSError, IndexError, StopIteration):
        with open("/proc/self/cgroup") as file:
            own = next(line for line in file if line.startswith("0::")).strip()[4:]
        with open("/proc/self/mountinfo") as file:
            mount = next(line.split() for line in file if " - cgroup2 " in line)
        if mount[3] == "/":  # else the paths in /proc/self/cgroup are not below the mount
            folder = os.path.join(mount[4], own, f"fluidmcp-{os.getpid()}")
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # left, and empty, by a guardian of this pid that was killed
            os.mkdir(folder)
            if os.path.exists(os.path.join(folder, "cgroup.kill")):  # Linux 5.14
                return folder
            os.rmdir(folder)
    return ""


def write(cgroup: str, name: str, value: bytes) -> None:
    """Write to a file of a cgroup; what is refused there is done by signals."""
    with contextlib.suppress(OSError), open(os.path.join(cgroup, name), "wb", buffering=0) as file:
        file.write(value)


def become_head(parent: int, keep: int) -> None:
    """In the forked child: a session of its own, pristine signals, no descriptor but the output."""
    os.setsid()
    if ON_LINUX:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that took effect
            os._exit(127)
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX") if not ON_LINUX else 65536)


def prctl(option: int, value: int) -> None:
    """Call prctl(2)."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def report(**message: int | str) -> None:
    """Tell the gateway, if there is one."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def watch_gateway() -> list[int]:
    """Descriptors that become readable when the gateway is gone or asks for the end; exits if it is gone already.

    The pipe alone would not do: a process that the gateway's host has forked may hold a copy of its other end.
    """
    gateway = int(sys.argv[1])
    watched = [0]
    with contextlib.suppress(AttributeError, OSError):  # Linux 5.3
        watched.append(os.pidfd_open(gateway))
    if os.getppid() != gateway:
        sys.exit(0)
    return watched


def read_order(gateway: list[int]) -> dict[str, Any]:
    """The first line of fd 0; exits if the gateway went, or had enough, before all of it was written."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select(gateway, [], [])
        piece = os.read(0, 65536) if ready == [0] else b""
        if not piece:
            sys.exit(0)
        line += piece
    try:
        order: dict[str, Any] = json.loads(line)
    except ValueError:
        sys.exit(0)
    if line.endswith(b"\n\n"):
        sys.exit(0)
    return order


def exact(text: str) -> bytes:
    """Bytes as the gateway has them, each sent as one character."""
    return text.encode("latin-1")


def watch_children() -> int:
    """A descriptor that becomes readable when a child ends."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def serve(tree: Tree, gateway: list[int], wakeup: int) -> None:
    """Return when the tree is to be ended: asked for, or the gateway or the head is gone."""
    while not tree.head_is_gone:
        ready, _, _ = select.select([*gateway, wakeup], [], [])
        if wakeup in ready:
            drain(wakeup)
            tree.reap()
        if ready != [wakeup]:
            return


def end(tree: Tree, wakeup: int, grace: float) -> None:
    """Leave nothing."""
    tree.reap()
    told = tree.members()
    if not tree.is_empty:
        tree.signal(signal.SIGTERM)
        tree.signal(signal.SIGCONT)
    deadline, rescan = time.monotonic() + grace, time.monotonic() + RESCAN
    pause = POLL
    while not tree.is_empty:
        left = deadline - time.monotonic()
        if left <= 0:
            tree.kill()
        elif time.monotonic() >= rescan:  # not at each death: what was just forked has its parent's handler yet
            told |= tree.tell(told)
            rescan = time.monotonic() + RESCAN
        wait = pause if left <= 0 else min(left, RESCAN if ON_LINUX else POLL)
        woken = select.select([wakeup], [], [], wait)[0]
        pause = POLL if woken else min(2 * pause, 1.0)  # what cannot be killed is not worth a core
        drain(wakeup)
        tree.reap()


def drain(descriptor: int) -> None:
    """Empty a wake-up pipe."""
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass


def main() -> None:
    """Start the head, watch it, end the tree."""
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a thread of the gateway may have blocked SIGCHLD
    if ON_LINUX:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup = watch_children()
    gateway = watch_gateway()
    order = read_order(gateway)
    tree = Tree()
    argv = [exact(text) for text in order["argv"]]
    env = {exact(name): exact(value) for name, value in order["env"].items()}
    failure = tree.start(exact(order["program"]), argv, env)
    if failure:
        report(errno=failure)
    else:
        report(pid=tree.head, cgroup=tree.cgroup)
        serve(tree, gateway, wakeup)
    grace = order["stop_timeout"]
    end(tree, wakeup, min(grace, ORPHANS_GRACE) if tree.head_is_gone else grace)
    if tree.cgroup:
        with contextlib.suppress(OSError):
            os.rmdir(tree.cgroup)
    report(empty=True)


if __name__ == "__main__":
    try:
        main()
    except OSError as fault:
        if fault.errno != errno.EPIPE:
            raise
