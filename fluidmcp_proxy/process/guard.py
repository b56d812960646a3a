"""The gateway's end of a guardian: its process and the three pipes to it.

Not asyncio's or anyio's subprocess: their transports kill the process when an event loop is torn down, and wait for
pipes that the guardian's tree may hold after it. Nothing here does more to a guardian than closing its pipes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import anyio
from anyio.abc import ByteReceiveStream

__all__ = ["Guard", "Pipe"]

_PROGRAM = Path(__file__).with_name("guardian.py")
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_PERIOD = 0.01


class Guard:
    """A running guardian. ``reports`` is what it says, ``output`` what its tree prints."""

    def __init__(self, env: Mapping[str, str], lock_fd: int | None) -> None:
        """Start it; a moment's synchronous work, so that a cancellation cannot come in between.

        Raises:
            OSError: no process can be made.
        """
        self._process = subprocess.Popen(
            # The pid tells a gateway that dies before its guardian has looked from one that lives.
            [sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid())],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: env[name] for name in env if name in _INHERITED or name.startswith("FLUIDMCP_INTERNAL_")},
            start_new_session=True,
            pass_fds=() if lock_fd is None else (lock_fd,),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._orders = self._process.stdin
        os.set_blocking(self._orders.fileno(), False)
        self.reports = Pipe(self._process.stdout)
        self.output = Pipe(self._process.stderr)

    @property
    def pid(self) -> int:
        """Its pid, nobody else's before ``gone()`` has returned."""
        return self._process.pid

    async def send(self, order: bytes) -> None:
        """Give it its order; that it is gone already will be seen by its reports' end."""
        left = memoryview(order)
        while left:
            try:
                left = left[os.write(self._orders.fileno(), left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._orders.fileno())
            except BrokenPipeError:
                return

    def dismiss(self) -> None:
        """Have it end its tree. Said besides closing, since a process that the host has forked may hold a copy."""
        if not self._orders.closed:
            try:
                os.write(self._orders.fileno(), b"\n")
            except (BlockingIOError, BrokenPipeError):
                pass
            self._orders.close()

    async def gone(self) -> None:
        """Return when it has exited, and bury it."""
        while self._process.poll() is None:  # noqa: ASYNC110 - no event without a child watcher
            await anyio.sleep(_PERIOD)

    def kill(self) -> None:
        """The last resort with one that does not react."""
        self._process.kill()

    def close(self) -> None:
        """Close what is left of the pipes. One that ends its tree still is buried whenever it has."""
        if self._process.poll() is None:  # the scope was torn down early, with its event loop perhaps
            threading.Thread(target=self._process.wait, name="guardian's end", daemon=True).start()
        self._orders.close()
        self.reports.close()
        self.output.close()


class Pipe(ByteReceiveStream):
    """The reading end of a pipe."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        os.set_blocking(file.fileno(), False)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """What there is, at most ``max_bytes``; waits for something, ``EndOfStream`` when nobody can write any more."""
        await anyio.lowlevel.checkpoint()  # a writer that is always ahead must not keep the others waiting
        while True:
            try:
                data = os.read(self._file.fileno(), max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._file.fileno())
                continue
            if not data:
                raise anyio.EndOfStream
            return data

    async def aclose(self) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close it; nobody may be reading."""
        self._file.close()
