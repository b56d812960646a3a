"""Logging of the command line: lines for people, or a JSON object a line. The library itself configures none."""

from __future__ import annotations

import json
import logging
import time

import anyio

from fluidmcp_proxy.cli.terminal import Board
from fluidmcp_proxy.config.settings import LogFormat
from fluidmcp_proxy.gateway.record import RequestRecord, access_log
from fluidmcp_proxy.gateway.relay import AnswerTruncated

__all__ = ["Terminal", "configure_logging"]

TRACE = 5
"""uvicorn's level below DEBUG."""

_TALKATIVE = ("/websockets/", "/message_logger.py")
"""Parts of the paths of uvicorn's and websockets' modules that log what requests hold."""

_FLUSH_EVERY = 0.2
_MOST_HELD = 1000


class Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error. Lines of requests (``report``) are held back for a moment and written together.

    A line alone costs a system call or two, which is as much as checking a request does. Any other line writes at once
    what was held back, so the order stays. A ``board`` on the same terminal makes room first.
    """

    def __init__(self, form: LogFormat = "text") -> None:
        super().__init__()
        self._held: list[str] = []
        self.board: Board | None = None
        self._form = _JsonFormatter() if form == "json" else _Formatter()
        self.setFormatter(self._form)
        self.addFilter(_is_no_abort)
        self.addFilter(_tells_no_secret)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        try:
            self._held.append(self.format(record))
            self.flush()
        except Exception:  # logging's own way: a line that cannot be written must not end the program
            self.handleError(record)

    def report(self, record: RequestRecord) -> None:
        """Take the line of a request, which logging would need 10 µs for."""
        if access_log.isEnabledFor(logging.INFO):
            self._held.append(self._form.of_request(record))
            if len(self._held) >= _MOST_HELD:
                self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        held, self._held = self._held, []
        if held:
            if self.board is not None:
                self.board.clear()
            self.stream.write("\n".join([*held, ""]))
        super().flush()

    async def flush_forever(self) -> None:
        """Write what is held back again and again."""
        while True:
            await anyio.sleep(_FLUSH_EVERY)
            if self._held:
                self.flush()


class _Formatter(logging.Formatter):
    """The usual one, with the date of a second made once."""

    _second = -1
    _date = ""
    _point = ","

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return self._moment(record.created)

    def of_request(self, record: RequestRecord) -> str:
        """The line of a request that is over now."""
        return f"{self._moment(time.time())} INFO    {record}"

    def _moment(self, seconds: float) -> str:
        second = int(seconds)
        if second != self._second:
            self._second = second
            self._date = time.strftime(self.default_time_format, self.converter(second))
        return f"{self._date}{self._point}{int(1000 * (seconds - second)):03}"


class _JsonFormatter(_Formatter):
    """One object a line; the parts of an access line are keys of it. Times are UTC (RFC 3339)."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    _point = "."
    # json.dumps would make an encoder for every line.
    _encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        line = self._begun(record.created, record.levelname, record.name)
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._encode(line)

    def of_request(self, record: RequestRecord) -> str:
        """The line of a request that is over now."""
        return self._encode(self._begun(time.time(), "INFO", access_log.name) | record._asdict())

    def _begun(self, seconds: float, level: str, logger: str) -> dict[str, object]:
        return {"time": self._moment(seconds) + "Z", "level": level.lower(), "logger": logger}


def configure_logging(level: str, form: LogFormat = "text") -> Terminal:
    """Send the log of the gateway and of uvicorn to standard error, from ``level`` on."""
    logging.addLevelName(TRACE, "TRACE")
    # Nothing shows these, and they cost as much as the rest of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    vars(logging)["logAsyncioTasks"] = False  # which Python 3.11 does not have
    terminal = Terminal(form)
    logging.basicConfig(level=logging.WARNING, handlers=[terminal], force=True)
    for name in ("fluidmcp_proxy", "uvicorn"):
        logging.getLogger(name).setLevel(TRACE if level == "trace" else level.upper())
    return terminal


def _is_no_abort(record: logging.LogRecord) -> bool:
    """Drop the traceback of an aborted answer: the access line and the model's own line tell of it."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, AnswerTruncated)


def _tells_no_secret(record: logging.LogRecord) -> bool:
    """Drop what uvicorn and websockets say of a handshake (its query, at DEBUG its headers), and uvicorn at TRACE of
    every request (its query): any of them may be a key.
    """
    return record.levelno >= logging.WARNING or not any(place in record.pathname for place in _TALKATIVE)
