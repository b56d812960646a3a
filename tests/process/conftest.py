"""Every test of this room ends with no process of its own left."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.process.marks import Mark, children


@pytest.fixture
def mark() -> Iterator[Mark]:
    before = set(children(os.getpid()))
    mark = Mark()
    try:
        yield mark
        left = mark.pids()
        assert not left
        assert set(children(os.getpid())) <= before  # no guardian either, and no zombie
    finally:
        mark.kill()
