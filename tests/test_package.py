"""The package as a whole: its names, its manners on import, its rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fluidmcp_proxy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fluidmcp_proxy"

AUDIT = Path(__file__).with_name("audit_import.py")


def test_public_names() -> None:
    assert sorted(fluidmcp_proxy.__all__) == [
        "ConfigError",
        "Gateway",
        "GatewayConfig",
        "GatewayError",
        "GatewayMiddleware",
        "ModelConfig",
        "ModelState",
        "ModelStatus",
        "__version__",
        "app",
        "create_app",
        "load_config",
    ]
    for name in fluidmcp_proxy.__all__:
        assert getattr(fluidmcp_proxy, name) is not None


def test_importing_starts_opens_and_reads_nothing() -> None:
    environment = {**os.environ, "FLUIDMCP_CONFIG": "/nowhere.json"}
    command = [sys.executable, str(AUDIT)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output == ""


def test_app_is_made_once() -> None:
    assert fluidmcp_proxy.app is fluidmcp_proxy.app


def test_an_unknown_name() -> None:
    assert not hasattr(fluidmcp_proxy, "nothing")


def test_no_module_is_called_after_nothing() -> None:
    meaningless = {"utils", "helpers", "common", "base", "core", "manager"}
    assert not meaningless & {path.stem for path in PACKAGE.rglob("*.py")}


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {path.name for path in (ROOT / "tests").iterdir()}
