"""What is known of a request that is over: the one value from which its access line and the metrics are made.

None of it is what a client may choose freely, but for the request id: no path, no query, no header, no body.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

__all__ = ["RequestRecord", "access_log", "log_request"]

access_log = logging.getLogger("fluidmcp_proxy.access")


class RequestRecord(NamedTuple):
    """One request, as a log calls its parts. As a string it is the access line.

    ``route`` is one of a few names, ``-`` where none was found; ``model`` an id or ``-``; ``status`` is that of the
    answer, None where none had begun. ``bytes`` and ``chunks`` are those of the body that a model's server answered.
    ``seconds`` is all the time it took, ``ttfb`` that until the first byte of this body, ``queue`` that of waiting for
    the model: None where it did not come to that. ``outcome`` is ``complete``, ``client_left``, ``upstream_died``,
    ``cut`` or ``refused``, ``code`` that of the gateway's own error, ``key`` the name of the client's key.
    """

    request_id: str
    method: str
    route: str
    model: str
    status: int | None
    bytes: int
    chunks: int
    seconds: float
    ttfb: float | None
    queue: float | None
    outcome: str
    code: str
    key: str

    def __str__(self) -> str:
        return (
            f"{self.request_id} {self.method} {self.route} model={self.model} status={self.status or '-'}"
            f" bytes={self.bytes} chunks={self.chunks} seconds={self.seconds:.3f} ttfb={_shown(self.ttfb)}"
            f" queue={_shown(self.queue)} outcome={self.outcome} code={self.code} key={self.key}"
        )


def log_request(record: RequestRecord) -> None:
    """Write the access line of a request, at INFO."""
    if access_log.isEnabledFor(logging.INFO):
        # Not access_log.info(), which would walk the stack for the place of this line.
        access_log.handle(access_log.makeRecord(access_log.name, logging.INFO, "", 0, record, (), None))


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}" if seconds else "0.000"
