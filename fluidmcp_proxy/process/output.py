"""What a model's server prints: the last lines in memory, more of it in a rotating file, secrets in neither.

Read in blocks, so that neither a flood nor a line without end blocks the child or grows the gateway.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

import anyio
from anyio.abc import ByteReceiveStream

__all__ = ["MAX_LINES", "MAX_LINE_BYTES", "Output"]

logger = logging.getLogger("fluidmcp_proxy.process")

MAX_LINES = 1000
MAX_LINE_BYTES = 8 * 1024
_BLOCK_BYTES = 64 * 1024
_FILE_BYTES, _OLD_FILES = 10 * 1024 * 1024, 2
# Keys of Hugging Face and of the OpenAI kind, wherever they come from.
_KEYS = r"\bhf_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{8,}"
_HIDDEN = "***"
# C0 and C1 controls but the tab: a terminal that shows the log must not obey the model's server.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != 0x09}
del _CONTROLS[0x0A]  # what lines are joined with


class Output:
    """The output of one model's server, over all its restarts. ``path`` is created with the first line."""

    def __init__(self, path: Path | None, *, secrets: Iterable[str] = ()) -> None:
        # A secret of several lines, like a private key, is printed line by line.
        words = {part for word in secrets for part in (word, *word.splitlines()) if part == word or len(part) >= 8}
        self._secrets = sorted(words - {""}, key=len, reverse=True)
        self._redact = re.compile("|".join([*map(re.escape, self._secrets), _KEYS])).sub
        self._longest = max((len(word.encode("utf-8", "replace")) for word in words), default=0) + 256
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._file = None if path is None else _File(path)
        self._rest = b""
        self._overlong = False  # the rest of a line is being dropped
        self._fresh = 0  # lines since the last launch
        self._count = 0  # lines in all
        self._drained = anyio.Event()

    def begin(self) -> None:
        """Another launch begins: ``tail(…, of_this_launch=True)`` has no line of an earlier one."""
        self._fresh = 0

    def tail(self, lines: int, *, of_this_launch: bool = False) -> list[str]:
        """The last ``lines`` lines, at most ``MAX_LINES``, the one that is being written included."""
        unfinished = self._shown([self._without_a_beginning(_last_state(self._rest))]) if self._rest else []
        kept = list(self._lines)
        if of_this_launch:
            kept = kept[max(0, len(kept) - self._fresh) :]
        return [*kept, *unfinished][-lines:] if lines > 0 else []

    @property
    def count(self) -> int:
        """How many lines there have been, kept or not; of one that is being written nothing is counted."""
        return self._count

    def since(self, count: int) -> list[str]:
        """The lines after the first ``count``, as far as they are kept."""
        newer = min(self._count - count, len(self._lines))
        return list(self._lines)[-newer:] if newer > 0 else []

    async def drain(self, stream: ByteReceiveStream) -> None:
        """Take everything from ``stream`` until it ends; what follows its last line end counts as a line."""
        self._drained = anyio.Event()
        try:
            while True:
                self.feed(await stream.receive(_BLOCK_BYTES))
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        finally:
            self.feed(b"\n" if self._rest else b"")
            if self._file is not None:
                self._file.close()
            self._drained.set()

    async def drained(self) -> None:
        """Return when the stream has ended."""
        await self._drained.wait()

    def feed(self, block: bytes) -> None:
        """Take a block of bytes, cut anywhere."""
        *ended, rest = (self._rest + block).split(b"\n")
        if ended:
            if self._overlong:
                ended[0], self._overlong = b"", False
            self._add([_last_state(line) for line in ended])
        self._hold(rest)

    def _hold(self, rest: bytes) -> None:
        """Keep the line that has no end yet, or add its beginning when it is too long already and drop the rest."""
        if self._overlong:
            self._rest = b""
            return
        if b"\r" in rest:
            rest = _last_state(rest) + (b"\r" if rest.endswith(b"\r") else b"")
        if len(rest) > MAX_LINE_BYTES + self._longest:
            self._add([rest])
            self._overlong, rest = True, b""
        self._rest = rest

    def _add(self, lines: list[bytes]) -> None:
        shown = self._shown(lines)
        self._lines.extend(shown)
        self._fresh += len(shown)
        self._count += len(shown)
        if self._file is not None and shown:
            self._file.write("\n".join(shown))

    def _without_a_beginning(self, rest: bytes) -> bytes:
        """``rest`` less the first part of a secret that it may end with: the other part has not been read yet."""
        for word in self._secrets:
            encoded = word.encode("utf-8", "replace")
            for length in range(min(len(encoded) - 1, len(rest)), 3, -1):
                if rest.endswith(encoded[:length]):
                    return rest[:-length] + _HIDDEN.encode()
        return rest

    def _shown(self, lines: list[bytes]) -> list[str]:
        """Lines as they may be shown: redacted before they are cut or escaped, which could hide a part of a secret."""
        limit = MAX_LINE_BYTES + self._longest
        text = b"\n".join([line[:limit] for line in lines]).decode("utf-8", "replace")
        text = self._redact(_HIDDEN, text).translate(_CONTROLS)
        return [line[:MAX_LINE_BYTES] for line in text.split("\n") if line]


def _last_state(line: bytes) -> bytes:
    """What a terminal would show of a line: a progress bar writes each state over the last one with a CR."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class _File(RotatingFileHandler):
    """The rotating file, private to the user. A full disk costs lines of it and nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8", delay=True)
        self._complained = False

    def write(self, text: str) -> None:
        self.emit(logging.LogRecord("", logging.INFO, "", 0, text, None, None))

    def _open(self) -> TextIOWrapper:
        folder = Path(self.baseFilename).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def close(self) -> None:
        with suppress(OSError, ValueError):  # what it could not write before, it cannot write now
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        self.close()  # drops what is buffered; the next line opens it again, and may find room
        if not self._complained:
            self._complained = True
            logger.warning("%s cannot be written: %s", self.baseFilename, sys.exc_info()[1])
