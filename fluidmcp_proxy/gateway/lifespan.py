"""The ASGI lifespan protocol around an async context manager."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fluidmcp_proxy.errors import FluidMCPError

__all__ = ["serve_lifespan", "surround_lifespan"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


async def serve_lifespan(context: AbstractAsyncContextManager[object], receive: Receive, send: Send) -> None:
    """Enter ``context`` at start-up and leave it at shutdown.

    What the user can mend (``FluidMCPError``) is reported in one line by ``lifespan.startup.failed``: raising would
    make uvicorn's ``lifespan=auto`` serve the app all the same.
    """
    await receive()
    started = False
    try:
        async with context:
            started = True
            await send({"type": "lifespan.startup.complete"})
            await receive()
    except FluidMCPError as error:
        await send({"type": f"lifespan.{'shutdown' if started else 'startup'}.failed", "message": str(error)})
        return
    await send({"type": "lifespan.shutdown.complete"})


async def surround_lifespan(
    context: AbstractAsyncContextManager[object], app: App, scope: Message, receive: Receive, send: Send
) -> None:
    """Run the lifespan of ``app`` inside ``context``.

    The app's last word (shutdown done, or start-up failed) is held back until ``context`` has been left, since a
    server may exit as soon as it hears it. An app without a lifespan is one whose lifespan does nothing.
    """
    inner = _Lifespan(receive, send)
    try:
        async with context:
            try:
                await app(scope, inner.receive, inner.send)
            except Exception:
                if inner.has_answered:
                    raise
                await inner.serve_alone()
    except FluidMCPError as error:
        if inner.has_answered:
            raise
        await inner.report_failure(error)
        return
    await inner.finish()


class _Lifespan:
    """The server's side of a lifespan, as an app inside sees it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._started = False  # the server's lifespan.startup was received
        self._last_word: Message | None = None
        self.has_answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._started = True
        return message

    async def send(self, message: Message) -> None:
        self.has_answered = True
        if message["type"] == "lifespan.startup.complete":
            await self._send(message)
        else:
            self._last_word = message

    async def serve_alone(self) -> None:
        """What an app without a lifespan would have said."""
        if not self._started:
            await self.receive()
        await self.send({"type": "lifespan.startup.complete"})
        await self.receive()
        await self.send({"type": "lifespan.shutdown.complete"})

    async def report_failure(self, error: FluidMCPError) -> None:
        if not self._started:
            await self.receive()
        await self._send({"type": "lifespan.startup.failed", "message": str(error)})

    async def finish(self) -> None:
        if self._last_word is not None:
            await self._send(self._last_word)
