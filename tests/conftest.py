"""Fixtures that every room's tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("fuzz", max_examples=20_000)


@pytest.fixture
def anyio_backend() -> str:
    """Run ``anyio`` tests on asyncio; a test that is about trio asks for it itself."""
    return "asyncio"
