"""One request through the gateway: its bytes to the model's server, the answer's bytes back.

Races the exchange against the client's leaving, before and after the first byte. A truncated answer is made to look
like one: ASGI has no abort, so ``abort`` says how that is done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from fluidmcp_proxy.errors import GatewayError, UpstreamError, UpstreamUnavailable
from fluidmcp_proxy.gateway.body import ClientDisconnected, RequestBody
from fluidmcp_proxy.gateway.departure import race_departure
from fluidmcp_proxy.gateway.loading import is_streamed, late_refusal, telling
from fluidmcp_proxy.gateway.sse import EventSplitter, is_event_stream
from fluidmcp_proxy.models.scheduler import Lease
from fluidmcp_proxy.upstream.client import Response, Sink, Transport
from fluidmcp_proxy.upstream.headers import response_headers

if TYPE_CHECKING:
    from fluidmcp_proxy.gateway.tracing import Trace

__all__ = ["AnswerTruncated", "Outgoing", "Relay"]

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_CONNECT_TRIES = 2


class AnswerTruncated(Exception):
    """Raised out of the app to abort a response that cannot be completed; not a fault of this program."""


class Outgoing(NamedTuple):
    """The request as the model's server will see it."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    request_id: bytes
    anthropic: bool


class Relay:
    """The way of one request. After ``run()`` its counters say how it went.

    ``status`` is that of the answer once it has begun, ``outcome`` one of ``complete``, ``client_left``,
    ``upstream_died`` and ``cut``. The answer's body is counted in the lease.
    """

    __slots__ = (
        "_body",
        "_error",
        "_events",
        "_lease",
        "_news",
        "_outgoing",
        "_send",
        "_trace",
        "_writer_of",
        "outcome",
        "status",
    )

    def __init__(
        self,
        outgoing: Outgoing,
        body: RequestBody,
        lease: Lease,
        send: Send,
        news: Callable[[], str] | None = None,
        trace: Trace | None = None,
        writer_of: Callable[[Send], Sink | None] | None = None,
    ) -> None:
        """``news`` says what the model does, for a client that wants to be told while it waits.

        ``writer_of`` is the server's extension ``fluidmcp.write``.
        """
        self._outgoing = outgoing
        self._body = body
        self._lease = lease
        self._send = send
        self._news = news
        self._trace = trace
        self._writer_of = writer_of
        self._events: EventSplitter | None = None
        self._error: GatewayError | None = None
        self.status = 0
        self.outcome = "client_left"

    @property
    def code(self) -> str:
        """That of the error with which it ended, or ``-``."""
        return "-" if self._error is None else self._error.code

    async def run(self) -> None:
        """Answer the request, or find that nobody wants the answer any more.

        Raises:
            GatewayError: nothing was answered yet, so that it can be said by an answer.
            AnswerTruncated: the answer broke off and has been aborted.
        """
        race = race_departure(self._body.client_left)
        self._lease.interrupt = race.interrupt
        async with race:
            try:
                await self._forward()
                self.outcome = "complete"
            except GatewayError as error:
                self._error = error
                self.outcome = "upstream_died" if isinstance(error, UpstreamError) else "cut"
            except (ClientDisconnected, OSError):
                pass
        if self._lease.was_cut and self.outcome != "complete":
            self._error = self._lease.shutting_down()
            self.outcome = "cut"
        if self.outcome == "client_left" and self._events is not None and self._events.is_done:
            self.outcome = "complete"  # OpenAI's client closes right after [DONE], before the last chunk
        if self._error is not None:
            await self._tell(self._error)

    async def _forward(self) -> None:
        body = await self._body.start()
        out = self._outgoing
        for tries_left in reversed(range(_CONNECT_TRIES)):
            try:
                async with (
                    self._lease if self._news is None or not is_streamed(body) else self._told(self._news) as transport,
                    (transport if self._trace is None else self._trace.over(transport)).exchange(
                        out.method, out.target, out.headers, body
                    ) as answer,
                ):
                    await self._answer(answer)
                return
            except UpstreamUnavailable:
                # Not a byte has left. Its supervisor may not know yet that the server is gone: ask again.
                if not tries_left:
                    raise
                await anyio.sleep(0.05)

    async def _answer(self, answer: Response) -> None:
        send, lease, events = self._send, self._lease, self._events
        if events is None:
            self.status = answer.status
            headers = response_headers(answer.headers, request_id=self._outgoing.request_id)
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            events = self._events = EventSplitter() if is_event_stream(answer.headers) else None
        elif answer.status != 200 or not is_event_stream(answer.headers):
            last_words = await late_refusal(answer, anthropic=self._outgoing.anthropic)
            lease.count(len(last_words))
            await send({"type": "http.response.body", "body": last_words, "more_body": False})
            return
        sink = self._sink(events)
        async for chunk in answer.body:
            ended = answer.ended  # saves a message of its own for the end
            if events is not None:
                chunk = events.feed(chunk) + (events.rest() if ended else b"")
            if chunk:
                lease.count(len(chunk))
            if chunk or ended:
                await send({"type": "http.response.body", "body": chunk, "more_body": not ended})
            if ended:
                return
            if sink is not None:
                await answer.pour(sink)  # what it does not take comes here
        rest = b"" if events is None else events.rest()
        if rest:
            lease.count(len(rest))
        await send({"type": "http.response.body", "body": rest, "more_body": False})

    def _sink(self, events: EventSplitter | None) -> Sink | None:
        """What passes on a piece that is not the last at once, if the server can: no task is woken for it."""
        write = None if self._writer_of is None else self._writer_of(self._send)
        if write is None:
            return None
        count = self._lease.count

        def pass_on(piece: bytes) -> bool:
            if (events is not None and not events.is_whole(piece)) or not write(piece):
                return False
            if events is not None:
                events.feed(piece)
            count(len(piece))
            return True

        return pass_on

    @asynccontextmanager
    async def _told(self, news: Callable[[], str]) -> AsyncIterator[Transport]:
        """The lease, with comments in the stream while it is waited for."""
        async with AsyncExitStack() as stack:
            async with telling(self._begin_stream, self._comment, news):
                transport = await stack.enter_async_context(self._lease)
            yield transport

    async def _begin_stream(self) -> None:
        if self._events is None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers += [(b"preference-applied", b"progress"), (b"x-request-id", self._outgoing.request_id)]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self.status, self._events = 200, EventSplitter()

    async def _comment(self, comment: bytes) -> None:
        await self._send({"type": "http.response.body", "body": comment, "more_body": True})

    async def _tell(self, error: GatewayError) -> None:
        """Say what went wrong: by an answer where there is none yet, else inside the stream, and abort it."""
        if not self.status:
            raise error
        events = self._events
        event = b""
        if events is not None and events.at_boundary and not events.is_done:
            event = error.event(anthropic=self._outgoing.anthropic)
        await abort(self._send, event, error)


async def abort(send: Send, last_words: bytes, reason: GatewayError) -> None:
    """End a response that has begun such that no client takes it for complete; always raises ``AnswerTruncated``.

    Raising is enough under a bare ASGI server, but a middleware in between (Starlette's ``BaseHTTPMiddleware``) ends
    the chunked body cleanly when the app raises. A body that is a ``str`` can be encoded by no layer, so sending one
    breaks the response wherever that happens.
    """
    try:
        if last_words:
            await send({"type": "http.response.body", "body": last_words, "more_body": True})
        await send({"type": "http.response.body", "body": "aborted", "more_body": True})
    except Exception as exc:  # whatever the layer that choked raises
        raise AnswerTruncated(reason.message) from exc
    raise AnswerTruncated(reason.message) from reason
