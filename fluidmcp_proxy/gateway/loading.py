"""Comments in the stream of a client that waits for its model, for those who ask for them with ``Prefer: progress``.

A model loads for minutes, and many a proxy on the way gives up a connection that is silent for one. A comment (a line
that begins with a colon, WHATWG HTML §9.2.6) keeps it, and tells a person what is going on. It takes the status 200
with it, so what goes wrong later is told as an event.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from fluidmcp_proxy.errors import UpstreamInvalidResponse, ungrouped
from fluidmcp_proxy.models.state import ModelStatus
from fluidmcp_proxy.upstream.client import Body, Headers, Response

__all__ = ["asks_for_progress", "is_streamed", "late_refusal", "telling", "what_it_does"]

_FIRST_AFTER = 1.0
"""Seconds of waiting before the answer begins with a comment: until then, an error still has its own status."""
_EVERY = 5.0
_CHECKED_EVERY = 1.0

_MOST_OF_A_REFUSAL = 64 * 1024
_PROGRESS = re.compile(rb"(?:^|[,;])\s*progress\s*(?:$|[,;])", re.IGNORECASE).search


def asks_for_progress(headers: Headers) -> bool:
    """Whether ``Prefer: progress`` (a preference of ours, RFC 7240 §2) is among the headers."""
    return any(name == b"prefer" and _PROGRESS(value) for name, value in headers)


def is_streamed(body: Body) -> bool:
    """Whether a request's body asks for a stream of events. One that was not collected is not looked into."""
    if not isinstance(body, bytes):
        return False
    try:
        document = json.loads(body)
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("stream") is True


def what_it_does(status: ModelStatus) -> str:
    """What a model that is not ready does, without a word of its server's."""
    doing = status.stage or ""
    if status.percent is not None:
        doing += f" {status.percent} %"
    return f"{status.id} is {status.state}" + (f", {doing}" if doing else "")


@asynccontextmanager
async def telling(
    begin: Callable[[], Awaitable[None]], comment: Callable[[bytes], Awaitable[None]], text: Callable[[], str]
) -> AsyncIterator[None]:
    """While the block waits: ``begin()`` after a second, and a ``comment()`` of ``text()`` whenever that changes."""
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_tell, begin, comment, text)
            yield
            tasks.cancel_scope.cancel()


async def _tell(
    begin: Callable[[], Awaitable[None]], comment: Callable[[bytes], Awaitable[None]], text: Callable[[], str]
) -> None:
    await anyio.sleep(_FIRST_AFTER)
    with anyio.CancelScope(shield=True):  # half a message must not be left
        await begin()
    told, due = "", anyio.current_time()
    while True:
        said, now = text(), anyio.current_time()
        if said != told or now >= due:
            told, due = said, now + _EVERY
            with anyio.CancelScope(shield=True):
                await comment(b": " + said.encode() + b"\n\n")
        await anyio.sleep(_CHECKED_EVERY)


async def late_refusal(answer: Response, *, anthropic: bool) -> bytes:
    """The events that end a stream which has begun with comments, when the server's answer is no stream."""
    read = bytearray()
    async for chunk in answer.body:
        read += chunk
        if len(read) > _MOST_OF_A_REFUSAL:
            break
    error = UpstreamInvalidResponse(f"The model's server answered with status {answer.status}, and not with a stream.")
    try:
        told = json.loads(read)
    except ValueError:
        told = None
    if not (isinstance(told, dict) and "error" in told):
        return error.event(anthropic=anthropic)
    data = b"data: " + json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    return b"event: error\n" + data if anthropic else data + b"data: [DONE]\n\n"
