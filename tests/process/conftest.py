"""Every test of this room ends with no process of its own left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.process.marks import Mark, marked


@pytest.fixture
def mark() -> Iterator[Mark]:
    with marked() as mark:
        yield mark
