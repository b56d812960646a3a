"""The replicas of one model as one transport: each request goes to one, and to another if that cannot be reached.

It counts what is inside each and asks ``balancing``. It starts and stops nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.replicas import affinity_header
from fluidmcp_proxy.errors import ShuttingDown, UpstreamDisconnected, UpstreamUnavailable
from fluidmcp_proxy.models.balancing import LeastBusy, PrefixMap, by_key, prompt_blocks
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import ModelState
from fluidmcp_proxy.upstream.client import Address, Body, Headers, Response, Sink, Transport
from fluidmcp_proxy.upstream.websocket import WebSocket

__all__ = ["Pool", "Replica"]

T = TypeVar("T")

_AVOIDED_FOR = 10.0
"""Seconds for which a replica that could not be reached is the last choice (nginx's ``fail_timeout``)."""


class Replica:
    """One server of several, and the requests inside it.

    ``server`` is set by whoever makes it, since it is made with what this counts. ``authority`` is its Host header.
    ``in_flight`` includes the ``conversations``, WebSockets, of which nobody knows whose turn it is. ``progress`` grows
    with every byte answered and every request ended. ``is_cut``: what is inside is being cut, since the server has to
    stop.
    """

    def __init__(self, address: Address) -> None:
        self.server: Server
        self.authority = address.authority
        self.in_flight = 0
        self.conversations = 0
        self.progress = 0
        self.avoided_until = 0.0
        self.is_cut = False
        self._emptied: anyio.Event | None = None

    def __repr__(self) -> str:
        return f"<Replica at {self.authority.decode()} in_flight={self.in_flight}>"

    def begin(self, address: Address) -> None:
        """Its server has been started, and listens at ``address``."""
        self.authority = address.authority
        self.avoided_until = 0.0
        self.is_cut = False

    async def drain(self, timeout: float) -> None:
        """Wait until no request is inside; those that are after ``timeout`` seconds are to be cut."""
        with anyio.move_on_after(timeout):
            while self.in_flight:
                self._emptied = anyio.Event()
                await self._emptied.wait()
        self.is_cut = self.in_flight > 0

    @property
    def unanswered(self) -> int:
        """The requests that wait for the server, by which liveness sees that it should do something."""
        return self.in_flight - self.conversations

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A request is inside."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.progress += 1
            if not self.in_flight and self._emptied is not None:
                self._emptied.set()


class Pool:
    """A ``Transport`` over the ``replicas`` of the model that ``config`` describes."""

    def __init__(self, config: ModelConfig, replicas: Sequence[Replica]) -> None:
        self._name = config.id
        self._replicas = replicas
        self._header = affinity_header(config.affinity)
        self._prefixes = PrefixMap() if config.affinity == "prefix" else None
        self._least_busy = LeastBusy()

    def __repr__(self) -> str:
        return f"<Pool of {self._name!r}, inside: {[replica.in_flight for replica in self._replicas]}>"

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        """See ``Transport.exchange``. Raises ``ShuttingDown``, too: the request was cut, since its replica stops."""
        blocks: list[int] = []
        if self._prefixes is not None and body is not None:
            # Looked at and not read: after a connect that failed the caller sends the same body again.
            blocks = prompt_blocks(body if isinstance(body, bytes) else getattr(body, "beginning", b""))

        def on(replica: Replica, transport: Transport) -> AbstractAsyncContextManager[Response]:
            return transport.exchange(method, target, _addressed(headers, replica), body)

        async with self._on_one(on, headers, blocks) as (replica, response):
            yield _Counted(response, replica)

    @asynccontextmanager
    async def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AsyncIterator[WebSocket]:
        """See ``Transport.open_websocket``. Raises ``ShuttingDown`` as ``exchange`` does."""

        def on(replica: Replica, transport: Transport) -> AbstractAsyncContextManager[WebSocket]:
            addressed = _addressed(headers, replica)
            return transport.open_websocket(target, addressed, subprotocols, max_message=max_message)

        async with self._on_one(on, headers) as (replica, websocket):
            replica.conversations += 1
            try:
                yield websocket
            finally:
                replica.conversations -= 1

    async def aclose(self) -> None:
        """Leave the connections to the servers."""

    def begin(self, replica: Replica, address: Address) -> None:
        """The server of ``replica`` has been started, and listens at ``address``: its cache is empty."""
        replica.begin(address)
        if self._prefixes is not None:
            self._prefixes.forget(self._replicas.index(replica))

    @asynccontextmanager
    async def _on_one(
        self,
        on: Callable[[Replica, Transport], AbstractAsyncContextManager[T]],
        headers: Headers,
        blocks: Sequence[int] = (),
    ) -> AsyncIterator[tuple[Replica, T]]:
        """What ``on`` opens on a replica, the first that can be reached."""
        tried: set[Replica] = set()
        error = UpstreamUnavailable(f"No replica of LLM model '{self._name}' is ready.")
        while choice := self._choose(headers, blocks, tried):
            replica, transport = choice
            was_reached = False
            with replica.one_more():
                try:
                    async with on(replica, transport) as opened:
                        was_reached = True
                        yield replica, opened
                        return
                except UpstreamUnavailable as exc:
                    if was_reached:
                        raise
                    error = exc  # nothing was sent
                except UpstreamDisconnected as exc:
                    if not replica.is_cut:
                        raise
                    message = f"LLM model '{self._name}' is being stopped, or the replica that had the request."
                    raise ShuttingDown(message, retry_after=5) from exc
            replica.avoided_until = anyio.current_time() + _AVOIDED_FOR
            tried.add(replica)
        raise error

    def _choose(
        self, headers: Headers, blocks: Sequence[int], tried: Collection[Replica]
    ) -> tuple[Replica, Transport] | None:
        """One that was not tried; one that seems to be away only if none else is left."""
        now, replicas = anyio.current_time(), self._replicas
        transports = [None if replica in tried else replica.server.transport for replica in replicas]
        present = [index for index, transport in enumerate(transports) if transport is not None]
        usable = [
            index
            for index in present
            if replicas[index].avoided_until <= now and replicas[index].server.status.state is ModelState.READY
        ] or present
        if not usable:
            return None
        index = self._decide(headers, blocks, [replica.in_flight for replica in replicas], usable)
        transport = transports[index]
        assert transport is not None
        return replicas[index], transport

    def _decide(self, headers: Headers, blocks: Sequence[int], loads: Sequence[int], usable: Collection[int]) -> int:
        if self._header is not None:
            for name, value in headers:
                if name == self._header:
                    return by_key(value, loads, usable)
        index = None if self._prefixes is None else self._prefixes.find(blocks, loads, usable)
        if index is None:
            index = self._least_busy.choose(loads, usable)
        if self._prefixes is not None:
            self._prefixes.remember(blocks, index)
        return index


class _Counted:
    """A ``Response`` whose body counts as progress of its replica."""

    __slots__ = ("_chunks", "_replica", "_response", "headers", "reason", "status")

    def __init__(self, response: Response, replica: Replica) -> None:
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        self._response = response
        self._chunks = response.body
        self._replica = replica

    @property
    def ended(self) -> bool:
        """Whether the body has given all."""
        return self._response.ended

    @property
    def body(self) -> AsyncIterator[bytes]:
        """Raw chunks as they come."""
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk = await anext(self._chunks)
        self._replica.progress += len(chunk)
        return chunk

    async def pour(self, sink: Sink) -> None:
        """See ``Response.pour``."""
        replica = self._replica

        def counted(piece: bytes) -> bool:
            taken = sink(piece)
            if taken:
                replica.progress += len(piece)
            return taken

        await self._response.pour(counted)


def _addressed(headers: Headers, replica: Replica) -> list[tuple[bytes, bytes]]:
    return [(name, replica.authority if name == b"host" else value) for name, value in headers]
