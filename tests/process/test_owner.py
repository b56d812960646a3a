"""One gateway per configuration."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from fluidmcp_proxy.errors import FluidMCPError
from fluidmcp_proxy.process import owner
from fluidmcp_proxy.process.owner import MARKER, AlreadyOwned, own
from tests.process.marks import Mark
from tests.serving import DEADLINE, eventually

pytestmark = pytest.mark.anyio

PROGRAM = """
import anyio, sys
from pathlib import Path
from fluidmcp_proxy.process.owner import own
async def main():
    async with own("config", Path(sys.argv[1]), 0):
        print("owned", flush=True)
        await anyio.sleep(60)
anyio.run(main)
"""


@pytest.fixture
def elder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another gateway that owns ``config``."""
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "owned\n"
            yield process
        finally:
            process.kill()


def lock_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


async def test_a_second_one_is_refused_by_the_pid_of_the_first(tmp_path: Path, elder: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    with pytest.raises(AlreadyOwned, match=f"already_running: the gateway with pid {elder.pid} runs .*config"):
        async with own("config", tmp_path, 30):
            pass
    assert time.monotonic() - began < 10
    async with own("another", tmp_path, 0):
        pass


async def test_in_one_process_too(tmp_path: Path) -> None:
    async with own("config", tmp_path, 0):
        with pytest.raises(AlreadyOwned) as caught:
            async with own("config", tmp_path, 0):
                pass
    assert caught.value.pid == os.getpid()
    async with own("config", tmp_path, 0):
        pass


async def test_a_killed_owner_owns_nothing(tmp_path: Path, elder: subprocess.Popen[str]) -> None:
    elder.kill()
    os.waitid(os.P_PID, elder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    async with own("config", tmp_path, 0):
        assert lock_file(tmp_path).read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize("buried", [True, False])
async def test_what_a_dead_owner_leaves_is_waited_for(
    tmp_path: Path, elder: subprocess.Popen[str], buried: bool
) -> None:
    text = lock_file(tmp_path).read_text()
    elder.kill()
    os.waitid(os.P_PID, elder.pid, os.WEXITED | os.WNOWAIT)
    if buried:
        elder.wait()
    with open(lock_file(tmp_path)) as guardian:  # holds the lock for as long as it ends the tree
        fcntl.flock(guardian, fcntl.LOCK_EX)
        assert lock_file(tmp_path).read_text() == text
        with pytest.raises(AlreadyOwned, match="processes of its models are still being ended"):
            async with own("config", tmp_path, 0.1):
                pass
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_after, 0.05, guardian.close)
            with anyio.fail_after(DEADLINE):
                async with own("config", tmp_path, DEADLINE):
                    assert guardian.closed


async def _after(seconds: float, act: object) -> None:
    await anyio.sleep(seconds)
    act()  # type: ignore[operator]


async def test_a_pid_that_is_another_s_by_now_is_no_owner(tmp_path: Path) -> None:
    async with own("config", tmp_path, 0):
        pass
    path = lock_file(tmp_path)
    pid, started = path.read_text().splitlines()[0].split()
    path.write_text(f"{pid} {int(started) - 1}\nconfig\n")
    with open(path) as guardian:
        fcntl.flock(guardian, fcntl.LOCK_EX)
        with pytest.raises(AlreadyOwned, match="still being ended"):
            async with own("config", tmp_path, 0):
                pass


@pytest.mark.parametrize("content", ["", "nonsense\n", "12"])
async def test_a_file_that_says_nothing_of_use(tmp_path: Path, content: str) -> None:
    async with own("config", tmp_path, 0):
        pass
    path = lock_file(tmp_path)
    path.write_text(content)
    async with own("config", tmp_path, 0):
        assert path.read_text().startswith(f"{os.getpid()} ")
        path.write_text(content)
        with pytest.raises(AlreadyOwned):
            async with own("config", tmp_path, 0.05):
                pass


async def test_a_process_that_was_forked_does_not_own_after_us(tmp_path: Path) -> None:
    async with own("config", tmp_path, 0):
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
    try:
        async with own("config", tmp_path, 0):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def test_a_descriptor_is_not_inherited_by_chance(tmp_path: Path) -> None:
    async with own("config", tmp_path, 0) as ownership:
        assert not os.get_inheritable(ownership.descriptor)


# -- the folder


async def test_the_folder_is_made_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    async with own("config", folder, 0):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(lock_file(folder).stat().st_mode) == 0o600
    folder.chmod(0o777)
    async with own("config", folder, 0):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "file", "below a file", "lock is a link", "lock is a folder"])
async def test_a_folder_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.write_text("")
    elif kind == "below a file":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "run"
    else:
        async with own("config", folder, 0):
            pass
        path = lock_file(folder)
        path.unlink()
        path.symlink_to(tmp_path / "victim") if kind == "lock is a link" else path.mkdir()
    with pytest.raises(FluidMCPError, match="FLUIDMCP_RUNTIME_DIR"):
        async with own("config", folder, 0):
            pass
    assert not (tmp_path / "victim").exists()


async def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(FluidMCPError, match="not a folder of yours"):
        async with own("config", tmp_path, 0):
            pass


def test_the_owner_of_another_user_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", refuse)
    assert owner._is_alive(os.getpid())
    assert eventually(lambda: owner._started(os.getpid()))


# -- what a gateway left that was killed together with its guardian


async def test_the_next_owner_ends_the_orphans(mark: Mark, tmp_path: Path) -> None:
    async with own("config", tmp_path, 0) as ownership:
        orphans = mark.environment(**{MARKER: f"{ownership.key}.1"})
    strangers = mark.environment(**{MARKER: "somebody-else.1"})
    with (
        subprocess.Popen(["/bin/sleep", "60"], env=orphans) as orphan,
        subprocess.Popen(["/bin/sleep", "60"], env=strangers) as stranger,
    ):
        try:
            mark.wait_for(2)
            async with own("config", tmp_path, 0):
                assert orphan.wait(DEADLINE) == -signal.SIGKILL
                assert mark.pids() == {stranger.pid}
        finally:
            orphan.kill()
            stranger.kill()


async def test_another_folder_is_another_owner(tmp_path: Path) -> None:
    async with own("config", tmp_path / "a", 0) as one, own("config", tmp_path / "b", 0) as other:
        assert one.key != other.key
