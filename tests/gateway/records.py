"""What a gateway tells of its requests, as values."""

from __future__ import annotations

from fluidmcp_proxy.gateway.record import RequestRecord
from tests.serving import eventually


class Records:
    """Collects those of the gateways that report to it, and of no other in this process."""

    def __init__(self) -> None:
        self.seen: list[RequestRecord] = []

    def __call__(self, record: RequestRecord) -> None:
        self.seen.append(record)

    def next(self) -> RequestRecord:
        """The one after those that were taken already."""
        eventually(lambda: self.seen, "a request is over")
        return self.seen.pop(0)
