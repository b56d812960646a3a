"""Fixtures that every room's tests share."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# What looks at the page needs a browser's driver, which only its session installs.
collect_ignore = [] if find_spec("playwright") and find_spec("axe_playwright_python") else ["page"]

# What a shell has put into the background ignores Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same commit gives the same result wherever and however often it is tested: examples follow from the test itself,
# and none is judged by its time. Other examples are looked for by nox -s fuzz, anew each time.
settings.register_profile(
    "tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("fuzz", settings.get_profile("tests"), derandomize=False, max_examples=20_000)
settings.load_profile("tests")


@pytest.fixture
def anyio_backend() -> str:
    """Run ``anyio`` tests on asyncio; a test that is about trio asks for it itself."""
    return "asyncio"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As ``tmp_path``, where the path of a Unix socket has room in the kernel's 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="fmcp-", dir="/tmp") as folder:
        yield Path(folder)
