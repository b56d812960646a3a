"""Fixtures that every room's tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Run ``anyio`` tests on asyncio; a test that is about trio asks for it itself."""
    return "asyncio"
