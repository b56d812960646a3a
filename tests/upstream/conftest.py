"""Every test of this room runs over each way to exchange: ours on two event loops, httpx's on both backends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

WIRES: dict[str, Any] = {
    "raw": ("asyncio", {}),
    "raw-uvloop": ("asyncio", {"use_uvloop": True}),
    "httpx": ("asyncio", {}),
    "httpx-trio": ("trio", {}),
}


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "raw-uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return name


@pytest.fixture
def anyio_backend(wire: str) -> Any:
    return WIRES[wire]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """httpcore leaves its generators to the collector when an answer is left early; trio says so, and does no harm."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore:Async generator 'http(x|core):ResourceWarning"))
