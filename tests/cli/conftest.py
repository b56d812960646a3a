"""Running a command as the terminal does, with the two streams apart.

click's own runner does that by itself only from 8.2 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click
import pytest


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
