"""Flow control of one connection to a model's server, both ways: who reads it waits for bytes, the server is paused
while they are not taken, and who writes to it waits while they are not read. What the bytes mean is not known here."""

from __future__ import annotations

import asyncio
from typing import cast

__all__ = ["HIGH_WATER", "FlowControl"]

HIGH_WATER = 64 * 1024
"""Bytes received and not yet taken: above this the server is paused."""


class FlowControl(asyncio.Protocol):
    """What a connection is made of; it has one reader, and counts in ``_buffered`` what that one has not taken."""

    __slots__ = ("_buffered", "_drained", "_loop", "_paused", "_transport", "_waiter")

    _transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffered = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        """There while the server does not read."""

    async def wait(self) -> None:
        """Wait until there is something for the reader."""
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        """Called by the event loop."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Called by the event loop."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
