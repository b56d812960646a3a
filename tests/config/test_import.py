"""The environment has one reader."""

from __future__ import annotations

import ast
from pathlib import Path

import fluidmcp_proxy.config


def test_only_settings_reads_the_environment() -> None:
    folder = Path(fluidmcp_proxy.config.__file__).parent
    for file in sorted(folder.glob("*.py")):
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert file.name == "settings.py" or not names & {"environ", "getenv", "environb"}, file.name
