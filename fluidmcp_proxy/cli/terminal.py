"""Lines on a terminal: tables, and a block at its end that is drawn anew.

What is drawn is decided elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TextIO

__all__ = ["Board", "bar", "table"]

_BAR = 20
_UNKNOWN = (80, 24)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the cells of each column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def bar(percent: int | None) -> str:
    """``[#####---------------]  25 %``, of one width whatever the percentage is, None where that is not known."""
    if percent is None:
        return f"[{' ' * _BAR}]      "
    done = _BAR * min(100, max(0, percent)) // 100
    return f"[{'#' * done}{'-' * (_BAR - done)}] {percent:3} %"


class Board:
    """Lines at the end of the terminal ``stream``. Whoever else writes there calls ``clear()`` first."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = 0

    def draw(self, lines: Sequence[str]) -> None:
        """Show ``lines`` in the place of those before, as many and as much of each as there is room for."""
        columns, rows = self._size()
        room = max(1, rows - 2)
        if len(lines) > room:
            lines = [*lines[: room - 1], f"… and {len(lines) - room + 1} more"]
        self._erase()
        self._drawn = len(lines)
        self._stream.write("".join(f"{line[: columns - 1]}\n" for line in lines))
        self._stream.flush()

    def clear(self) -> None:
        """Take the lines away."""
        if self._drawn:
            self._erase()
            self._stream.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\r\x1b[J")  # ECMA-48: cursor up, erase to the end of the page
            self._drawn = 0

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return _UNKNOWN
        return (size.columns, size.lines) if size.columns and size.lines else _UNKNOWN
