"""One result of `endurance.py`: what was asked, what came out, and whether the goal is met."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How much of everything, and whether something may be installed for it."""

    part: float = 1.0
    install: bool = True

    def of(self, number: int) -> int:
        return max(1, round(number * self.part))


@dataclass(frozen=True)
class Row:
    what: str
    goal: str
    gateway: str
    beside: str
    """The same without the gateway, or with another proxy."""
    met: bool

    @property
    def cells(self) -> list[str]:
        return [self.what, self.goal, self.gateway, self.beside, "yes" if self.met else "**no**"]

    @property
    def text(self) -> str:
        return " | ".join(self.cells)
