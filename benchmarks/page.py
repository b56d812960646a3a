"""The measured part of `docs/performance.md`: tables between markers, so that the prose around them stays."""

from __future__ import annotations

import re
from collections.abc import Sequence

from machine import ROOT

PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance.svg"


def read(name: str) -> str:
    """What is between the markers of that name."""
    return PAGE.read_text().partition(_begin(name))[2].partition(_end(name))[0]


def write(name: str, text: str) -> None:
    before, begin, rest = PAGE.read_text().partition(_begin(name))
    _, end, after = rest.partition(_end(name))
    if not begin or not end:
        raise ValueError(f"{PAGE} has no markers of {name}")
    PAGE.write_text(before + begin + text.rstrip("\n") + "\n" + end + after)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "--:") -> str:
    """The first column is to the left."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def rows(text: str) -> list[list[str]]:
    """A table's rows, without its head."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [line.split(" | ") for line in lines[2:]]


def _begin(name: str) -> str:
    return f"<!-- {name}: begin -->\n"


def _end(name: str) -> str:
    return f"<!-- {name}: end -->\n"
