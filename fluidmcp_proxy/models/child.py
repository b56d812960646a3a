"""A model's server as its supervisor sees it: how it comes to life, how it ends, and why it may not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from fluidmcp_proxy.errors import FluidMCPError
from fluidmcp_proxy.upstream.client import Address

__all__ = ["CannotStart", "Child", "Failure", "Launcher"]


class CannotStart(FluidMCPError):
    """A start that failed; a ``final`` one would fail again: no such command, or somebody else listens on the port.

    ``reason`` is a word for a program, the exception's text a sentence for a person.
    """

    def __init__(self, reason: str, message: str, *, final: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.final = final


class Child(Protocol):
    """A server that was launched and not ended yet."""

    @property
    def pid(self) -> int | None:
        """Its first process, where there is one on this machine."""

    @property
    def address(self) -> Address:
        """Where it is to listen."""

    async def wait(self) -> str:
        """Return when it has ended, with a phrase that says how: ``exited with code 1``."""

    async def listening(self) -> Address | None:
        """Where it listens, verified to be itself; None while it does not yet.

        Raises:
            CannotStart: somebody else listens there.
        """


class Launcher(Protocol):
    """How a model's server comes to life."""

    def open(self) -> AbstractAsyncContextManager[Child]:
        """A scope with the server in it; leaving the scope leaves no process. May raise ``CannotStart``."""

    def tail(self, lines: int) -> Sequence[str]:
        """The last lines of its output, secrets redacted."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a server is not there: ``text`` is a phrase, ``final`` means that trying again is pointless."""

    reason: str
    text: str
    started: bool = False
    final: bool = False
