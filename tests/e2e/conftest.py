"""A real vLLM behind a real gateway process, shared by the tests as far as they leave it alive; never two at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .vllm import Gateway, Launch, Runner

ROOT = Path(__file__).parent.parent.parent

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a newer one on the network when imported
os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")

# The SDKs are installed for the e2e session only; every other session collects this folder too.
collect_ignore = [] if importlib.util.find_spec("openai") else ["test_clients.py", "test_engines.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="session")
def prepared() -> dict[str, Any]:
    """Paths of the environment with vLLM and of the weights; made if this machine does not have them yet."""
    command = [sys.executable, str(ROOT / "examples" / "cpu_model.py"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 3 and not os.environ.get("CI"):
        pytest.skip(f"no vLLM on this machine: {result.stderr}")
    assert result.returncode == 0, result.stderr
    paths: dict[str, Any] = json.loads(result.stdout)
    return paths


@pytest.fixture(scope="session")
def runner(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(prepared, tmp_path_factory.mktemp("gateway"))
    yield runner
    runner.stop()


@pytest.fixture
def launch(runner: Runner) -> Callable[[Launch], Gateway]:
    """A ready gateway, launched that way; the running one if it was."""
    return runner.ready


@pytest.fixture
def gateway(runner: Runner) -> Gateway:
    """A ready gateway under ``fluidmcp run``; whoever ends it gives the next test a new one."""
    return runner.ready("run")
