"""Which processes belong to a tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fluidmcp_proxy.process import tree
from tests.process.marks import STUB_COMMAND, Mark, content
from tests.serving import eventually

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(mark: Mark) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*argv: str, start_new_session: bool = False) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            argv, env=mark.environment(), stdout=subprocess.DEVNULL, start_new_session=start_new_session
        )
        started.append(process)
        return process

    yield start
    mark.kill()
    for process in started:
        process.wait()
    mark.wait_for(0)


def test_descendants(mark: Mark, start: Start) -> None:
    head = start(*STUB_COMMAND, "--never-ready", "--children", "1", "--grandchild")
    everyone = mark.wait_for(4)
    assert tree.descendants(head.pid) == everyone - {head.pid}
    assert everyone <= tree.descendants(os.getpid())
    assert tree.descendants(2**22 + 1) == frozenset()


def test_descendants_on_a_kernel_without_lists_of_children(
    mark: Mark, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = start(*STUB_COMMAND, "--never-ready", "--children", "1", "--grandchild")
    everyone = mark.wait_for(4)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert tree.descendants(head.pid) == everyone - {head.pid}


def test_members_by_their_mark_or_by_their_session(mark: Mark, start: Start) -> None:
    marked = start("/bin/sleep", "60", start_new_session=True)
    scrubbed = start("/usr/bin/env", "-i", "/bin/sleep", "60", start_new_session=True)
    # env has become sleep, without the mark. In the moment of an exec a process has neither arguments nor a mark.
    eventually(lambda: content(scrubbed.pid, "cmdline").startswith(b"/bin/sleep") and mark.pids() == {marked.pid})
    head = tree.find(scrubbed.pid)
    assert head is not None
    marker = f"FAULT_TEST={mark.value}"
    assert {process.pid for process in tree.members(head, marker)} == {marked.pid, scrubbed.pid}
    assert {process.pid for process in tree.members(None, marker)} == {marked.pid}
    earlier = replace(head, started=head.started - 1)  # the pid is another's by now
    assert {process.pid for process in tree.members(earlier, marker)} == {marked.pid}
    scrubbed.kill()


def test_the_youngest_come_first_also_after_the_highest_pid() -> None:
    assert tree.by_age([1, 42, 7, 900, 32000], 42) == [42, 7, 1, 32000, 900]
    assert tree.by_age([1, 42, 7, 900, 32000], 32767) == [32000, 900, 42, 7, 1]
    assert {1, os.getpid()} <= set(tree.youngest_first())


def test_a_zombie_is_no_process(mark: Mark, start: Start) -> None:
    process = start("/bin/true")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert tree.find(process.pid) is None


def test_a_process_whose_main_thread_has_ended_is_one(mark: Mark, start: Start) -> None:
    script = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).syscall(60, 0)  # exit(2) of this thread only
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the system call is x86-64's")
    process = start(sys.executable, "-I", "-S", "-c", script)
    eventually(lambda: _is_zombie(process.pid), "the end of its main thread")
    assert tree.find(process.pid) is not None
    process.kill()


def _is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
