"""Whatever becomes of the gateway, its guardian takes the tree with it and goes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluidmcp_proxy.process import guardian
from tests.process.marks import STUB_COMMAND, Mark, children, guardians, is_alive
from tests.serving import DEADLINE, eventually

PROGRAM = Path(__file__).with_name("gateway_program.py")
ROOT = Path(__file__).parents[2]
STUBBORN = [*STUB_COMMAND, "--never-ready", "--children", "1", "--grandchild", "--double-fork", "--ignore-sigterm"]


@contextlib.contextmanager
def gateway(mark: Mark, *argv: str, loop: str = "asyncio", **options: object) -> Iterator[subprocess.Popen[str]]:
    order = json.dumps({"argv": list(argv or STUBBORN), **options})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.process.gateway_program", order, loop],
        cwd=ROOT,
        env={**os.environ, "FAULT_TEST": mark.value},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def until_printed(process: subprocess.Popen[str], word: str) -> list[str]:
    """The words of the line that begins with that one."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], DEADLINE)[0]
    while not (line := process.stdout.readline()).startswith(word):
        assert line, f"ended before it printed {word}"
    return line.split()


@contextlib.contextmanager
def adopting() -> Iterator[Callable[[], bool]]:
    """Whoever loses its parent becomes this process's child; yields what tells whether no such one is left."""
    before = set(children(os.getpid()))

    def none_left() -> bool:
        for pid in set(children(os.getpid())) - before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return set(children(os.getpid())) <= before

    guardian.prctl(guardian.PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield none_left
    finally:
        guardian.prctl(guardian.PR_SET_CHILD_SUBREAPER, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGINT, signal.SIGTERM])
def test_the_gateway_ends_by_a_signal(mark: Mark, number: int) -> None:
    with gateway(mark) as process:
        until_printed(process, "started")
        mark.wait_for(1 + 5)
        (guarding,) = guardians(process.pid)
        process.send_signal(number)
        mark.wait_for(0)
        eventually(lambda: not is_alive(guarding), "the guardian's end")


@pytest.mark.parametrize("_", range(6))
def test_sigkill_at_a_random_moment(mark: Mark, _: int) -> None:
    """The guardian may not even be one yet by then, so what is left is known by whose child it becomes."""
    with adopting() as none_left, gateway(mark) as process:
        until_printed(process, "begun")
        time.sleep(random.uniform(0, 0.05))  # from before the guardian's start to a tree that is complete
        process.kill()
        process.wait()
        eventually(none_left, "the guardian's end")
        assert not mark.pids()


def test_a_process_that_the_host_has_forked_keeps_nothing_alive(mark: Mark) -> None:
    """It holds the gateway's end of the guardian's pipe, so that no end of file comes."""
    with gateway(mark, "/bin/sleep", "60", fork=True) as process:
        until_printed(process, "started")
        (guarding,) = guardians(process.pid)
        process.kill()
        eventually(lambda: not is_alive(guarding), "the guardian's end")
        mark.wait_for(1)
        mark.kill()
        mark.wait_for(0)


def test_nor_does_it_keep_a_gateway_from_ending_its_tree(mark: Mark) -> None:
    with gateway(mark, "/bin/sleep", "60", fork=True, seconds=0.05) as process:
        assert process.wait(DEADLINE) == 0
        mark.wait_for(1)
        mark.kill()
        mark.wait_for(0)


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
def test_under_uvloop(mark: Mark) -> None:
    with gateway(mark, loop="uvloop", seconds=0.1) as process:
        until_printed(process, "started")
        assert process.wait(DEADLINE) == 0
        assert not mark.pids()
    with gateway(mark, loop="uvloop") as process:
        until_printed(process, "started")
        process.kill()
        mark.wait_for(0)


def test_a_suspended_gateway_whose_output_pipe_is_full(mark: Mark) -> None:
    flood = "trap '' TERM; while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done"
    with gateway(mark, "/bin/sh", "-c", flood) as process:
        head = int(until_printed(process, "started")[1])
        process.send_signal(signal.SIGSTOP)
        (guarding,) = guardians(process.pid)
        eventually(lambda: b"pipe" in Path(f"/proc/{head}/wchan").read_bytes() or _sleeps(head), "a blocked head")
        process.kill()
        mark.wait_for(0)
        eventually(lambda: not is_alive(guarding), "the guardian's end")


def _sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


# -- the program by itself


@contextlib.contextmanager
def alone(gateway: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-I", "-S", guardian.__file__, str(gateway)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("said", [b"", b"{", b"\n", b'{"program": "/bin/sleep"', b'{"program": 1\n', b"{}\n\n"])
def test_without_a_whole_order_it_goes(said: bytes) -> None:
    with alone(os.getpid()) as process:
        out, err = process.communicate(said, DEADLINE)
        assert (process.returncode, out, err) == (0, b"", b"")


def test_the_child_of_another_goes_at_once() -> None:
    """Its gateway was gone before it looked."""
    with alone(1 if os.getppid() == 1 else os.getppid()) as process:
        assert process.wait(DEADLINE) == 0


def test_it_reports_and_leaves_last(mark: Mark) -> None:
    order = {"program": "/bin/sh", "argv": ["sh", "-c", "exit 3"], "env": mark.environment(), "stop_timeout": 1}
    with alone(os.getpid()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        reports = [json.loads(line) for line in process.stdout]
        assert [list(report) for report in reports] == [["pid", "cgroup"], ["exit"], ["empty"]]
        assert os.waitstatus_to_exitcode(reports[1]["exit"]) == 3
        assert process.wait(DEADLINE) == 0


FAST_STORM = """
import os, signal
for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def storm():
    while True:
        try:
            if os.fork(): os._exit(0)
            os.setsid()
        except OSError: pass
for _ in range(2):
    if not os.fork(): storm()
signal.pause()
"""


def test_a_storm_without_a_pause(mark: Mark) -> None:
    with gateway(mark, sys.executable, "-I", "-S", "-c", FAST_STORM) as process:
        until_printed(process, "started")
        (guarding,) = guardians(process.pid)
        process.kill()
        eventually(lambda: not is_alive(guarding), "the guardian's end")  # a look at a storm misses what is new
        mark.wait_for(0)


def test_it_imports_nothing_of_ours() -> None:
    text = Path(guardian.__file__).read_text()
    assert "import fluidmcp" not in text
    assert "from fluidmcp" not in text
