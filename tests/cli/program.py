"""The real program as a process of its own, for tests of what it says and how it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.serving import DEADLINE, eventually

FLUIDMCP = [sys.executable, "-m", "fluidmcp_proxy", "run"]


class Running:
    """A command line with the stub on PATH, and what it has written to either stream."""

    def __init__(self, argv: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
        self._output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(argv, env=environment, stdout=file, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        return self._output.read_text()

    def until_said(self, words: str) -> str:
        """Wait for a line with these words, and return it."""

        def look() -> list[str]:
            ended = self.process.poll() is not None
            complete, _, _ = self.said.rpartition("\n")
            lines = [line for line in complete.splitlines() if words in line]
            assert lines or not ended, self.said
            return lines

        line: str = eventually(look, f"it says '{words}'")[-1]
        return line

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(DEADLINE)


Program = Callable[..., contextlib.AbstractContextManager[Running]]


@contextlib.contextmanager
def started(*argv: str, folder: Path) -> Iterator[Running]:
    """A command that may run beside a gateway; what it says is in a file in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLUIDMCP_")}
    running = Running(argv, {**environment, "PYTHONUNBUFFERED": "1"}, folder / f"output-{time.monotonic_ns()}")
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
