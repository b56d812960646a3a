"""Fixtures that every room's tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# What looks at the page needs a browser's driver, which only its session installs.
collect_ignore = [] if find_spec("playwright") and find_spec("axe_playwright_python") else ["page"]

settings.register_profile("fuzz", max_examples=20_000)


@pytest.fixture
def anyio_backend() -> str:
    """Run ``anyio`` tests on asyncio; a test that is about trio asks for it itself."""
    return "asyncio"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As ``tmp_path``, where the path of a Unix socket has room in the kernel's 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="fmcp-", dir="/tmp") as folder:
        yield Path(folder)
