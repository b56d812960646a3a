"""Who listens on a Unix socket, and where one can be."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluidmcp_proxy.config.endpoint import LONGEST_SOCKET
from fluidmcp_proxy.errors import FluidMCPError
from fluidmcp_proxy.process import unix_socket

US = [os.getpid()]


@contextlib.contextmanager
def bound(path: Path, *, listens: bool = True) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        if listens:
            server.listen(1)
        yield server


def test_a_listener_and_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a socket"
    assert unix_socket.is_free(str(path))
    with bound(path):
        assert not unix_socket.is_free(str(path))
        assert unix_socket.verified(str(path), US) == (True, False)
        assert unix_socket.verified(str(path), []) == (False, True)
        assert unix_socket.verified(str(path) + "s", US) == (False, False)
    assert unix_socket.is_free(str(path))  # its file is there still
    assert unix_socket.verified(str(path), US) == (False, False)
    assert path.exists()


def test_bound_is_not_listening(tmp_path: Path) -> None:
    with bound(tmp_path / "s", listens=False):
        assert unix_socket.is_free(str(tmp_path / "s"))
        assert unix_socket.verified(str(tmp_path / "s"), US) == (False, False)


def test_one_that_hides_another_is_not_enough(tmp_path: Path) -> None:
    """A stranger whose file was removed listens still, and which of the two is reached cannot be told."""
    script = "import socket, sys; s = socket.socket(1); s.bind(sys.argv[1]); s.listen(); print(flush=True); input()"
    argv = [sys.executable, "-c", script, str(tmp_path / "s")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        unix_socket.remove(str(tmp_path / "s"))
        with bound(tmp_path / "s"):
            assert unix_socket.verified(str(tmp_path / "s"), US) == (False, True)
            assert unix_socket.verified(str(tmp_path / "s"), [*US, other.pid]) == (True, False)
        other.communicate(b"\n")


def test_a_full_backlog_is_not_free(tmp_path: Path) -> None:
    with bound(tmp_path / "s"), contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(tmp_path / "s"))
        assert not unix_socket.is_free(str(tmp_path / "s"))


def test_what_is_no_socket_is_neither_free_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        assert not unix_socket.is_free(str(tmp_path / name))
        unix_socket.remove(str(tmp_path / name))
        assert (tmp_path / name).exists()
    unix_socket.remove(str(tmp_path / "nothing"))


def test_a_private_path(tmp_path: Path) -> None:
    first, second = (unix_socket.private_path(tmp_path / "run", "m") for _ in range(2))
    assert first != second
    folder = Path(first).parent
    assert folder == tmp_path / "run" / "sockets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with bound(Path(first)):
        pass


def test_what_a_killed_gateway_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, other = (Path(unix_socket.private_path(tmp_path, name)) for name in ("m", "n"))
    for path in (left, other):
        with bound(path):
            pass
    unix_socket.private_path(tmp_path, "m")
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize("length", range(75, 85))
def test_a_folder_with_a_long_name(short_path: Path, length: int) -> None:
    runtime = short_path / ("r" * (length - len(str(short_path)) - 1))
    assert len(str(runtime)) == length
    path = Path(unix_socket.private_path(runtime, "m"))
    assert len(os.fsencode(path)) <= LONGEST_SOCKET
    assert (path.parent.parent == runtime) is (length + len("/sockets/") + 21 <= LONGEST_SOCKET)
    assert path.parent.stat().st_uid == os.getuid()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with bound(path):
        assert unix_socket.verified(str(path), US) == (True, False)
    unix_socket.remove(str(path))


def test_a_folder_that_others_may_enter_is_closed(tmp_path: Path) -> None:
    (tmp_path / "sockets").mkdir(mode=0o777)
    (tmp_path / "sockets").chmod(0o755)
    assert stat.S_IMODE(Path(unix_socket.private_path(tmp_path, "m")).parent.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_s_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sockets").symlink_to("elsewhere")
    with pytest.raises(FluidMCPError, match="not a folder of yours"):
        unix_socket.private_path(tmp_path, "m")
