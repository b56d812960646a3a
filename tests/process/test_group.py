"""A tree of processes as a scope: whatever is in it, leaving leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest

from fluidmcp_proxy.process import guardian
from fluidmcp_proxy.process.group import CommandError, ExitStatus, ProcessGroup, find_program, open_process_group
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import Ownership
from tests.process.marks import STUB_COMMAND, Mark, content, guardians
from tests.serving import DEADLINE

pytestmark = pytest.mark.anyio

READY_WITHIN = 30


@asynccontextmanager
async def running(
    mark: Mark, *argv: str, stop_timeout: float = 5.0, output: Output | None = None, owner: Ownership | None = None
) -> AsyncIterator[ProcessGroup]:
    output = output or Output(None)
    group = open_process_group(argv, env=mark.environment(), stop_timeout=stop_timeout, output=output, owner=owner)
    with anyio.fail_after(60):
        async with group as process:
            yield process


async def run_shell(mark: Mark, script: str, **options: object) -> tuple[ExitStatus, list[str]]:
    """Run a shell script to its end; its exit status and its output."""
    output = Output(None)
    async with running(mark, "/bin/sh", "-c", script, output=output, **options) as group:  # type: ignore[arg-type]
        status = await group.wait()
    return status, output.tail(1000)


async def members(mark: Mark, at_least: int) -> set[int]:
    """Wait until so many have been seen; not at once, since of a storm one look finds some and the next one others."""
    seen: set[int] = set()
    with anyio.fail_after(READY_WITHIN):
        while len(seen := seen | mark.pids()) < at_least:
            await anyio.sleep(0.01)
    return seen


async def until_said(output: Output, words: str) -> None:
    with anyio.fail_after(READY_WITHIN):
        while output.tail(1) != [words]:
            await anyio.sleep(0.01)


async def test_the_head_runs_in_a_session_of_its_own(mark: Mark) -> None:
    async with running(mark, "/bin/sleep", "60") as group:
        assert await members(mark, 1) == {group.pid} == group.pids()
        assert os.getsid(group.pid) == os.getpgid(group.pid) == group.pid
        assert repr(group) == f"<ProcessGroup pid={group.pid} running>"
    assert not mark.pids()
    assert await group.wait() == ExitStatus(signal=signal.SIGTERM)


@pytest.mark.parametrize(
    ("script", "status", "phrase"),
    [
        ("exit 0", ExitStatus(code=0), "exited with code 0"),
        ("exit 3", ExitStatus(code=3), "exited with code 3"),
        ("kill -KILL $$", ExitStatus(signal=9), "was killed by SIGKILL"),
        ("ulimit -c 0; kill -SEGV $$", ExitStatus(signal=11), "was killed by SIGSEGV"),
    ],
)
async def test_how_the_head_ended_is_passed_on(mark: Mark, script: str, status: ExitStatus, phrase: str) -> None:
    found, _ = await run_shell(mark, script)
    assert found == status
    assert str(found) == phrase


def test_a_signal_without_a_name_has_a_number() -> None:
    assert str(ExitStatus(signal=63)) == "was killed by signal 63"


async def test_the_environment_is_the_given_one_and_the_marker(mark: Mark) -> None:
    output = Output(None)
    env = {**mark.environment(), "WORDS": "a b\tc", "BYTES": os.fsdecode(b"\xff\xfe"), "UMLAUT": "ü", "EMPTY": ""}
    script = "import os; print(sorted(os.environb.items()))"
    argv = [sys.executable, "-I", "-S", "-c", script]
    async with open_process_group(argv, env=env, stop_timeout=5, output=output) as group:
        await group.wait()
    found = dict(eval(output.tail(1)[0]))
    assert len(found.pop(b"FLUIDMCP_INTERNAL_TREE")) == 32
    found.pop(b"LC_CTYPE", None)  # Python's own, in the C locale
    assert found == {os.fsencode(name): os.fsencode(value) for name, value in env.items()}


async def test_the_head_has_dev_null_and_the_output_and_no_other_descriptor(mark: Mark, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        output = Output(None)
        script = "import os; print({n: os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')[:-1]})"
        argv = [sys.executable, "-I", "-S", "-c", script]
        async with running(mark, *argv, output=output, owner=Ownership(lock.fileno(), "key")) as group:
            await group.wait()
        found: dict[str, str] = eval(output.tail(1)[0])
        assert set(found) == {"0", "1", "2"}
        assert found["0"] == "/dev/null"
        assert found["1"] == found["2"]
        assert found["1"].startswith("pipe:")


async def test_the_guardian_holds_the_lock(mark: Mark, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        async with running(mark, "/bin/sleep", "60", owner=Ownership(lock.fileno(), "key")):
            (guardian,) = guardians(os.getpid())
            folder = Path(f"/proc/{guardian}/fd")
            assert str(tmp_path / "lock") in [os.readlink(link) for link in folder.iterdir()]


async def test_signals_are_as_a_shell_has_them(mark: Mark) -> None:
    _, lines = await run_shell(mark, "grep -E 'Sig(Blk|Ign)' /proc/self/status")
    # Signals 32 and 33 are glibc's own; a fork while a thread starts may find one of them blocked.
    assert [int(line.split()[1], 16) & ~(0b11 << 31) for line in lines] == [0, 0]


# -- commands that cannot be run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("vllm-of-nowhere", "command 'vllm-of-nowhere' not found on PATH; install it or write its path"),
        ("/nowhere/vllm", "command '/nowhere/vllm' does not exist; write the path of a program"),
        ("/tmp", "command '/tmp' is not executable; chmod [+]x it"),
        ("/etc/passwd", "command '/etc/passwd' is not executable; chmod [+]x it"),
    ],
)
async def test_a_command_that_is_not_there(mark: Mark, command: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        async with running(mark, command):
            pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("#!/nowhere/python\n", "the interpreter that its first line names is missing"),
        ("echo hello\n", "a script needs a first line like #!/bin/sh"),
        ("", "a script needs a first line"),
    ],
)
async def test_a_script_that_cannot_be_executed(mark: Mark, tmp_path: Path, content: str, message: str) -> None:
    script = tmp_path / "vllm"
    script.write_text(content)
    script.chmod(0o755)
    with pytest.raises(CommandError, match=message):
        async with running(mark, str(script)):
            pass


async def test_an_argument_that_is_too_long_for_the_system(mark: Mark) -> None:
    with pytest.raises(CommandError, match=os.strerror(errno.E2BIG)):
        async with running(mark, "/bin/echo", "x" * 200_000):
            pass


async def test_long_arguments_arrive(mark: Mark) -> None:
    many = ["y" * 100_000] * 12  # more than a pipe holds
    output = Output(None)
    script = "import sys; print(sum(map(len, sys.argv)))"
    async with running(mark, sys.executable, "-I", "-S", "-c", script, *many, output=output) as group:
        await group.wait()
    assert output.tail(1) == [str(12 * 100_000 + 2)]


async def test_a_null_character_is_no_argument(mark: Mark) -> None:
    with pytest.raises(CommandError, match="null"):
        async with running(mark, "/bin/echo", "a\0b"):
            pass


def test_the_path_of_the_environment_counts(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_program("vllm", {"PATH": str(tmp_path)}) == str(program)
    with pytest.raises(CommandError, match="pip install vllm"):
        find_program("vllm", {"PATH": "/nowhere"})


# -- trees that are hard to end


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--children", "2"], 3),
        (["--children", "2", "--ignore-sigterm"], 3),
        (["--grandchild"], 3),
        (["--grandchild", "--ignore-sigterm"], 3),
        (["--double-fork"], 2),
        (["--double-fork", "--ignore-sigterm"], 2),
        (["--stopped-child"], 2),
        (["--fork-storm"], 3),
        (["--children", "2", "--grandchild", "--double-fork", "--stopped-child", "--fork-storm"], 8),
    ],
)
@pytest.mark.parametrize("leader", ["stopped", "killed"])
async def test_nothing_is_left(mark: Mark, options: list[str], count: int, leader: str) -> None:
    argv = [*STUB_COMMAND, "--never-ready", *options]
    async with running(mark, *argv, stop_timeout=0.2) as group:
        await members(mark, count)
        if leader == "killed":  # and the others stay behind
            os.kill(group.pid, signal.SIGKILL)
            assert await group.wait() == ExitStatus(signal=signal.SIGKILL)
    assert not mark.pids()


async def test_the_guardian_ends_what_a_head_leaves_behind_unasked(mark: Mark) -> None:
    async with running(mark, "/bin/sh", "-c", "sleep 60 & setsid sleep 60 & exit 7", stop_timeout=0.2) as group:
        assert await group.wait() == ExitStatus(code=7)
        await until_none(mark)


async def until_none(mark: Mark) -> None:
    with anyio.fail_after(READY_WITHIN):
        while mark.pids():
            await anyio.sleep(0.01)


async def test_sigterm_is_tried_first_and_given_time(mark: Mark, tmp_path: Path) -> None:
    # The shell itself writes: a program that it starts meanwhile is told to end, too, and may not come to writing.
    script = f"trap 'sleep 0.2; : > {tmp_path}/tidy; exit 0' TERM; echo ready; while :; do sleep 0.01; done"
    output = Output(None)
    async with running(mark, "/bin/sh", "-c", script, output=output) as group:
        await until_said(output, "ready")
    assert (await group.wait()) == ExitStatus(code=0)
    assert (tmp_path / "tidy").exists()


async def test_a_stopped_head_gets_its_sigterm(mark: Mark) -> None:
    async with running(mark, "/bin/sleep", "60", stop_timeout=20) as group:
        os.kill(group.pid, signal.SIGSTOP)
    assert await group.wait() == ExitStatus(signal=signal.SIGTERM)  # after the grace it would have been SIGKILL


async def test_output_written_while_it_ends_is_kept(mark: Mark) -> None:
    output = Output(None)
    script = "trap 'echo last words; exit' TERM; echo ready; while :; do sleep 0.01; done"
    async with running(mark, "/bin/sh", "-c", script, output=output):
        await until_said(output, "ready")
    assert output.tail(1) == ["last words"]


# -- the guardian itself


@pytest.mark.parametrize("options", [["--children", "2", "--ignore-sigterm"], ["--grandchild", "--double-fork"]])
async def test_a_killed_guardian_is_noticed_and_its_tree_ended(mark: Mark, options: list[str]) -> None:
    async with running(mark, *STUB_COMMAND, "--never-ready", *options) as group:
        await members(mark, 3)
        (guardian,) = guardians(os.getpid())
        os.kill(guardian, signal.SIGKILL)
        with anyio.fail_after(READY_WITHIN):
            status = await group.wait()
        assert "guardian" in str(status)
    assert not mark.pids()


async def test_a_guardian_that_hangs_is_done_without(mark: Mark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluidmcp_proxy.process.group._PATIENCE", 0.2)
    async with running(mark, *STUB_COMMAND, "--never-ready", "--children", "1", stop_timeout=0.1):
        await members(mark, 2)
        (guardian,) = guardians(os.getpid())
        os.kill(guardian, signal.SIGSTOP)
    assert not mark.pids()


async def test_the_guardian_is_idle_while_nothing_happens(mark: Mark) -> None:
    """It comes to rest, and then half a second passes in which it does not run at all."""

    def switches() -> int:
        lines = Path(f"/proc/{guardian}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    argv = [*STUB_COMMAND, "--never-ready", "--ignore-sigterm"]
    async with running(mark, *argv, stop_timeout=1) as group:
        await members(mark, 1)
        (guardian,) = guardians(os.getpid())
        with anyio.fail_after(READY_WITHIN):
            before = -1
            while switches() != before:
                before = switches()
                with anyio.move_on_after(0.5):
                    await group.wait()


# -- ways to leave


class Stop(Exception):
    pass


async def test_an_exception_in_the_body_passes_through(mark: Mark) -> None:
    with pytest.raises(Stop):
        async with running(mark, "/bin/sleep", "60"):
            raise Stop


@pytest.mark.timeout(600)
async def test_cancelled_at_every_await(mark: Mark) -> None:
    """The cancellation arrives ever later, until the end comes first."""
    reached_the_end = False
    step = 0
    while not reached_the_end:
        step += max(1, step // 6)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel_after, scope, step)
                async with running(mark, "/bin/sleep", "60", stop_timeout=2):
                    for _ in range(3):
                        await anyio.lowlevel.checkpoint()
                reached_the_end = True
                tasks.cancel_scope.cancel()
        assert not mark.pids()
        assert not guardians(os.getpid())


async def cancel_after(scope: anyio.CancelScope, step: int) -> None:
    """After so many turns of the event loop; after the first 20, the others being milliseconds."""
    for _ in range(min(step, 20)):
        await anyio.lowlevel.checkpoint()
    await anyio.sleep(max(0, step - 20) / 1000)
    scope.cancel()


async def test_side_by_side_they_do_not_hold_each_other(mark: Mark) -> None:
    """A guardian started later must not have a copy of what its elder waits for the end of."""
    async with running(mark, "/bin/sleep", "60") as first:
        async with running(mark, "/bin/sleep", "60") as second:
            assert first.pids().isdisjoint(second.pids())
            one, two = guardians(os.getpid())
            for guardian in (one, two):
                assert len(os.listdir(f"/proc/{guardian}/fd")) <= 6
        assert mark.count() == 1


async def test_launches_leave_neither_descriptors_nor_threads(mark: Mark) -> None:
    await run_shell(mark, "exit 0")
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(15):
        await run_shell(mark, "exit 0")
    # The servers that other tests keep running come and go with a few; a leak is one a launch.
    assert len(os.listdir("/proc/self/fd")) - descriptors < 8
    assert threading.active_count() - threads < 8


def test_on_trio(mark: Mark) -> None:
    anyio.run(_whole_life, mark, backend="trio")


def test_in_another_thread_than_the_main_one(mark: Mark) -> None:
    thread = threading.Thread(target=anyio.run, args=(_whole_life, mark))
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert not mark.pids()


async def _whole_life(mark: Mark) -> None:
    status, lines = await run_shell(mark, "echo out; echo err >&2; exit 5")
    assert (status, sorted(lines)) == (ExitStatus(code=5), ["err", "out"])
    async with running(mark, *STUB_COMMAND, "--never-ready", "--grandchild", "--ignore-sigterm", stop_timeout=0.2):
        await members(mark, 3)


@pytest.fixture
def cgroups() -> Path:
    """Where guardians make their cgroups; skips where none can be made."""
    made = guardian.make_cgroup()
    if not made:
        pytest.skip("no cgroup can be made here")
    os.rmdir(made)
    return Path(made).parent


def test_an_empty_cgroup_of_an_earlier_process_is_no_hindrance(cgroups: Path) -> None:
    folder = guardian.make_cgroup()
    try:
        assert guardian.make_cgroup() == folder == str(cgroups / f"fluidmcp-{os.getpid()}")
    finally:
        os.rmdir(folder)


def path_of_cgroup(pid: int) -> list[str]:
    (line,) = (line for line in content(pid, "cgroup").decode().splitlines() if line.startswith("0::"))
    return line.split("/")


@pytest.mark.parametrize("guardian_dies", [False, True])
async def test_a_cgroup_of_its_own_that_goes_with_the_tree(mark: Mark, cgroups: Path, guardian_dies: bool) -> None:
    argv = [*STUB_COMMAND, "--never-ready", "--grandchild", "--ignore-sigterm"]
    async with running(mark, *argv, stop_timeout=0.1) as group:
        await members(mark, 3)
        (made,) = (folder for folder in cgroups.glob("fluidmcp-*") if folder.name in path_of_cgroup(group.pid))
        inside = {int(line) for line in (made / "cgroup.procs").read_text().split()}
        assert inside == mark.pids()
        assert os.getpid() not in inside
        if guardian_dies:
            os.kill(guardians(os.getpid())[0], signal.SIGKILL)
            await group.wait()
    assert mark.pids() == set()
    assert not made.exists()


@pytest.mark.parametrize("victim", ["guardian", "both"])
async def test_a_storm_after_its_guardian_is_killed(mark: Mark, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """Without a cgroup's help, and also when the head dies with it."""
    monkeypatch.setattr("fluidmcp_proxy.process.tree.kill_cgroup", lambda folder: None)
    async with running(mark, *STUB_COMMAND, "--never-ready", "--fork-storm", "--ignore-sigterm") as group:
        await members(mark, 2)
        os.kill(guardians(os.getpid())[0], signal.SIGKILL)
        if victim == "both":
            with suppress(ProcessLookupError):
                os.kill(group.pid, signal.SIGKILL)
        await group.wait()
    assert mark.pids() == set()


LATE_FORK = """
import os, signal, time
def on_term(number, frame):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)
    os._exit(0)
signal.signal(signal.SIGTERM, on_term)
print("ready", flush=True)
while True: time.sleep(60)
"""


async def test_what_is_forked_during_the_grace_is_told_too(mark: Mark) -> None:
    """It need not wait for SIGKILL."""
    output = Output(None)
    began = 0.0
    async with running(mark, sys.executable, "-c", LATE_FORK, stop_timeout=60, output=output):
        await until_said(output, "ready")
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert mark.pids() == set()


async def test_the_rest_of_a_head_that_ended_by_itself_gets_a_short_grace(mark: Mark) -> None:
    """A restart shall not wait for ``stop_timeout``."""
    script = "(trap '' TERM; sleep 61 & wait; sleep 62) & exit 1"
    began = time.monotonic()
    async with running(mark, "/bin/sh", "-c", script, stop_timeout=60) as group:
        await group.wait()
    assert time.monotonic() - began < 30
    assert mark.pids() == set()
