"""Logging of the command line. The library itself configures none."""

from __future__ import annotations

import logging

from fluidmcp_proxy.gateway.relay import AnswerTruncated

__all__ = ["configure_logging"]

TRACE = 5
"""uvicorn's level below DEBUG."""


def configure_logging(level: str) -> None:
    """Send the log of the gateway and of uvicorn to standard error, from ``level`` on."""
    logging.addLevelName(TRACE, "TRACE")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    handler.addFilter(_is_no_abort)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("fluidmcp_proxy", "uvicorn"):
        logging.getLogger(name).setLevel(TRACE if level == "trace" else level.upper())


def _is_no_abort(record: logging.LogRecord) -> bool:
    """Drop the traceback of an aborted answer: the access line and the model's own line tell of it."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, AnswerTruncated)
