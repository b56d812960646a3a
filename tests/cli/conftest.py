"""Running a command as the terminal does, with the two streams apart.

click's own runner does that by itself only from 8.2 on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from tests.cli.program import Program, Running
from tests.process.marks import Mark, marked
from tests.serving import STUB, free_port


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Call a click command with arguments and environment variables (None: unset)."""

    def call(command: click.Command, *args: object, **environ: str | None) -> Outcome:
        for name, value in {"FLUIDMCP_CONFIG": None, **environ}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.main([str(arg) for arg in args])
        code = ended.value.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def tmp_path(short_path: Path) -> Path:
    """Short: the control socket is in it."""
    return short_path


@pytest.fixture
def mark() -> Iterator[Mark]:
    with marked() as mark:
        yield mark


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file whose ``command`` is a ``vllm`` on PATH: the stub server, with two processes that ignore SIGTERM."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    words = [sys.executable, "-S", "-E", str(STUB)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@" --children 1 --ignore-sigterm\n')
    program.chmod(0o755)
    port = str(free_port())
    model = {"command": "vllm", "args": ["serve", "m", "--port", port], "stop_timeout": 0.3}
    model["endpoints"] = {"base_url": f"http://127.0.0.1:{port}/v1"}
    folders = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run"), "drain_timeout": 0.2}
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"llmModels": {"m": model}, "gateway": folders}))
    return path


@pytest.fixture
def program(mark: Mark, config: Path) -> Program:
    """Run a command line; at its end nothing of it may be left."""

    @contextlib.contextmanager
    def run(*argv: str, **variables: str) -> Iterator[Running]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("FLUIDMCP_")}
        env |= {"PATH": f"{config.parent / 'bin'}:{env['PATH']}", "FAULT_TEST": mark.value}
        env |= {"FLUIDMCP_CONFIG": str(config), "PYTHONUNBUFFERED": "1"}
        env |= variables
        running = Running(argv, env, config.with_name(f"output-{time.monotonic_ns()}"))
        try:
            yield running
        finally:
            running.process.kill()
            running.process.wait()
        mark.wait_for(0)

    return run
