"""What the gateway logs of its requests, as values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fluidmcp_proxy.gateway.record import RequestRecord, access_log
from tests.serving import eventually


class Records(logging.Handler):
    """Collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[RequestRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.msg, RequestRecord)
        self.seen.append(record.msg)

    def next(self) -> RequestRecord:
        """The one after those that were taken already."""
        eventually(lambda: self.seen, "a request is over")
        return self.seen.pop(0)


@contextmanager
def recording() -> Iterator[Records]:
    """Records of the requests that end inside the block."""
    records, level = Records(), access_log.level
    access_log.addHandler(records)
    access_log.setLevel(logging.INFO)
    try:
        yield records
    finally:
        access_log.setLevel(level)
        access_log.removeHandler(records)
