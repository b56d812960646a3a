"""The one place where a request that is over is accounted for: counted, told of, and its trace ended."""

from __future__ import annotations

from collections.abc import Callable

from fluidmcp_proxy.gateway.record import RequestRecord
from fluidmcp_proxy.gateway.request import Request
from fluidmcp_proxy.gateway.tally import Tally

__all__ = ["Accounts"]


class Accounts:
    """``tally`` counts every request; ``report`` is called with each but those that were only shown a page."""

    def __init__(self, report: Callable[[RequestRecord], None]) -> None:
        self.tally = Tally()
        self._report = report

    def close(self, request: Request, status: int | None, outcome: str, code: str = "-") -> None:
        """``request`` has ended, however it did; see ``RequestRecord``."""
        record = request.record(status, outcome, code)
        self.tally.count(record)
        if request.trace is not None:
            request.trace.end(record)
        is_page = record.model == "-" and outcome == "complete"
        if not is_page:
            self._report(record)
