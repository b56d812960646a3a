"""Every test of this room runs over each way to exchange: ours on two event loops, httpx's on both backends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from tests.models.virtual_time import VirtualTimeLoop

WIRES: dict[str, Any] = {
    "raw": ("asyncio", {}),
    "raw-uvloop": ("asyncio", {"use_uvloop": True}),
    "httpx": ("asyncio", {}),
    "httpx-trio": ("trio", {}),
}
TIMED: dict[str, Any] = {
    "raw-timed": ("asyncio", {"loop_factory": VirtualTimeLoop}),
    "httpx-timed": ("asyncio", {"loop_factory": VirtualTimeLoop}),
    "httpx-trio-timed": ("trio", {}),
}
"""For tests that must not run out of a time while the machine is busy: it passes only when nothing is left to do."""


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "raw-uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return name


@pytest.fixture
def anyio_backend(wire: str) -> Any:
    backend, options = {**WIRES, **TIMED}[wire]
    if wire == "httpx-trio-timed":
        options = {"clock": MockClock(autojump_threshold=0.02)}
    return backend, options


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """httpcore leaves its generators to the collector when an answer is left early; trio says so, and does no harm."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore:Async generator 'http(x|core):ResourceWarning"))
