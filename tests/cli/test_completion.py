"""Shell completion, as docs/cli.md has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fluidmcp_proxy.cli import main
from tests.serving import DEADLINE

PROGRAM = str(Path(sys.executable).with_name("fluidmcp"))
TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def said(**variables: str) -> str:
    env = {**os.environ, **variables}
    done = subprocess.run([PROGRAM], env=env, capture_output=True, text=True, timeout=DEADLINE, check=True)
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_source_for_each_shell(shell: str) -> None:
    assert re.search(rf"_FLUIDMCP_COMPLETE={shell}_source fluidmcp\b", TEXT)
    if shell != "bash":  # for which click asks the bash there is for its version
        assert "_FLUIDMCP_COMPLETE" in said(_FLUIDMCP_COMPLETE=f"{shell}_source")


def test_what_it_completes() -> None:
    words = said(_FLUIDMCP_COMPLETE="bash_complete", COMP_WORDS="fluidmcp ", COMP_CWORD="1").splitlines()
    assert {word.partition(",")[2] for word in words} == set(main.commands)
