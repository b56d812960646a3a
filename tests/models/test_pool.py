"""One transport over several replicas: who gets a request, who gets it next, and what is counted meanwhile."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import ShuttingDown, UpstreamDisconnected, UpstreamUnavailable
from fluidmcp_proxy.models.pool import Pool, Replica
from fluidmcp_proxy.models.state import Phase
from fluidmcp_proxy.upstream.client import Address, Body, Headers, Response, Sink
from fluidmcp_proxy.upstream.websocket import WebSocket
from tests.models.doubles import FakeResponse, FakeServer, FakeTransport, model
from tests.models.virtual_time import BACKEND

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return BACKEND


HEADERS = [(b"host", b"localhost"), (b"x-session", b"s")]
PROMPT = json.dumps({"prompt": "a" * 3000}).encode()


class Wire(FakeTransport):
    """Records what it was sent; ``refuses`` is raised instead of connecting, ``breaks`` inside the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: Exception | None = None
        self.breaks: Exception | None = None
        self.bodies: list[bytes] = []
        self.headers: list[Headers] = []
        self.websockets = 0

    @asynccontextmanager
    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, body: Body = None
    ) -> AsyncIterator[Response]:
        await anyio.lowlevel.checkpoint()
        if self.refuses:
            raise self.refuses
        self.headers.append(headers)
        received = b""
        if body is not None:
            received = body if isinstance(body, bytes) else b"".join([piece async for piece in body])
        self.bodies.append(received)
        yield _Answer(self)

    def open_websocket(
        self, target: bytes, headers: Headers, subprotocols: Sequence[str] = (), *, max_message: int
    ) -> AbstractAsyncContextManager[WebSocket]:
        return self._open_websocket(headers)

    @asynccontextmanager
    async def _open_websocket(self, headers: Headers) -> AsyncIterator[Any]:
        await anyio.lowlevel.checkpoint()
        if self.refuses:
            raise self.refuses
        self.websockets += 1
        yield headers


class _Answer(FakeResponse):
    def __init__(self, wire: Wire) -> None:
        super().__init__(200)
        self._wire = wire

    async def pour(self, sink: Sink) -> None:
        assert sink(b"taken")
        assert not sink(b"refused")

    @property
    async def body(self) -> AsyncIterator[bytes]:
        yield b"one "
        if self._wire.breaks:
            raise self._wire.breaks
        yield b"two"


class Rig:
    """A pool of replicas that are ready."""

    def __init__(self, count: int = 3, **keys: Any) -> None:
        self.replicas = [Replica(Address("http", f"host{number}", 80)) for number in range(count)]
        self.servers = [FakeServer(model()) for _ in self.replicas]
        self.wires = [Wire() for _ in self.replicas]
        for replica, server, wire in zip(self.replicas, self.servers, self.wires, strict=True):
            server.become_ready()
            server.transport = wire
            replica.server = server
        self.pool = Pool(model(**keys), self.replicas)

    def exchange(self, body: Body = None, headers: Headers = HEADERS) -> AbstractAsyncContextManager[Response]:
        return self.pool.exchange(b"POST", b"/v1/x", headers, body)

    async def ask(self, body: Body = None, headers: Headers = HEADERS) -> int:
        """The number of the replica that answered."""
        before = [len(wire.bodies) for wire in self.wires]
        async with self.exchange(body, headers) as response:
            assert b"".join([chunk async for chunk in response.body]) == b"one two"
        (index,) = [index for index, wire in enumerate(self.wires) if len(wire.bodies) > before[index]]
        return index

    @property
    def in_flight(self) -> list[int]:
        return [replica.in_flight for replica in self.replicas]


async def test_requests_side_by_side_are_spread() -> None:
    rig = Rig()
    async with AsyncExitStack() as stack:
        for count in range(1, 7):
            await stack.enter_async_context(rig.exchange())
            assert sum(rig.in_flight) == count
            assert max(rig.in_flight) - min(rig.in_flight) <= 1
    assert rig.in_flight == [0, 0, 0]


async def test_each_server_is_called_by_its_own_name() -> None:
    rig = Rig()
    for _ in range(3):
        await rig.ask()
    assert [wire.headers for wire in rig.wires] == [
        [[(b"host", b"host%d" % number), (b"x-session", b"s")]] for number in range(3)
    ]
    rig.pool.begin(rig.replicas[0], Address("http", "other", 81))
    await rig.ask()
    assert rig.wires[0].headers[-1][0] == (b"host", b"other:81")


async def test_one_that_cannot_be_reached_is_replaced_at_once_and_left_alone_for_a_while() -> None:
    rig = Rig()
    rig.wires[0].refuses = UpstreamUnavailable("no")
    assert [await rig.ask() for _ in range(6)] == [1, 2, 1, 2, 1, 2]
    assert rig.replicas[0].avoided_until > anyio.current_time()
    rig.wires[0].refuses = None
    rig.replicas[0].avoided_until = anyio.current_time()
    assert await rig.ask() == 0


async def test_one_that_was_started_anew_is_trusted_again() -> None:
    rig = Rig(2)
    rig.wires[0].refuses = UpstreamUnavailable("no")
    assert await rig.ask() == 1
    rig.wires[0].refuses = None
    rig.pool.begin(rig.replicas[0], Address("http", "a", 80))
    assert await rig.ask() == 0


async def test_one_that_is_avoided_is_better_than_none() -> None:
    rig = Rig(2)
    rig.wires[0].refuses = rig.wires[1].refuses = UpstreamUnavailable("no")
    with pytest.raises(UpstreamUnavailable, match=r"^no$"):
        await rig.ask()
    rig.wires[1].refuses = None
    assert await rig.ask() == 1
    assert rig.in_flight == [0, 0]


async def test_without_any_that_is_ready() -> None:
    rig = Rig(2)
    for server in rig.servers:
        server.become(Phase.COMING)
    with pytest.raises(UpstreamUnavailable, match="No replica of LLM model 'm' is ready"):
        await rig.ask()


async def test_one_that_a_probe_does_not_find_is_the_last_choice() -> None:
    """A server that somebody else runs has a transport whether it is there or not."""
    rig = Rig(2)
    rig.servers[0].phase = Phase.COMING
    assert [await rig.ask() for _ in range(3)] == [1, 1, 1]
    rig.wires[1].refuses = UpstreamUnavailable("no")
    assert await rig.ask() == 0


@pytest.mark.parametrize("error", [UpstreamDisconnected("gone"), UpstreamUnavailable("of the caller's own")])
async def test_a_request_that_has_arrived_is_not_sent_again(error: Exception) -> None:
    rig = Rig(2)
    for wire in rig.wires:
        wire.breaks = error
    with pytest.raises(type(error)) as caught:
        await rig.ask()
    assert caught.value is error
    assert [len(wire.bodies) for wire in rig.wires] == [1, 0]
    assert rig.in_flight == [0, 0]


class Pieces:
    """A body as it comes, of which the beginning is known."""

    def __init__(self, body: bytes, beginning: bytes) -> None:
        self.beginning = beginning
        self._left = [body[start : start + 100] for start in range(0, len(body), 100)]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)


@pytest.mark.parametrize("affinity", [None, "prefix"])
async def test_a_body_that_comes_in_pieces_is_whole_at_the_next_one_too(affinity: str | None) -> None:
    rig = Rig(2, affinity=affinity)
    body = Pieces(PROMPT, PROMPT[:2000])
    for wire in rig.wires:
        wire.refuses = UpstreamUnavailable("no")
    with pytest.raises(UpstreamUnavailable):
        await rig.ask(body)
    rig.wires[1].refuses = None
    assert await rig.ask(body) == 1
    assert rig.wires[1].bodies == [PROMPT]


async def test_a_body_that_comes_in_pieces_goes_where_its_beginning_was_seen() -> None:
    rig = Rig(affinity="prefix")
    home = await rig.ask(PROMPT)
    assert [await rig.ask(Pieces(PROMPT, PROMPT[:2000])) for _ in range(3)] == [home] * 3
    assert len({await rig.ask(Pieces(PROMPT, b"")) for _ in range(3)}) == 3


async def test_a_client_that_leaves_is_counted_out_wherever_it_was() -> None:
    rig = Rig(2)
    for steps in range(6):
        with anyio.CancelScope() as scope:

            async def leave(scope: anyio.CancelScope = scope, steps: int = steps) -> None:
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(leave)
                async with rig.exchange(PROMPT) as response:
                    async for _ in response.body:
                        await anyio.lowlevel.checkpoint()
                    await anyio.sleep_forever()
        assert rig.in_flight == [0, 0]


# Affinity


async def test_a_session_stays_with_its_replica() -> None:
    rig = Rig(affinity="header:X-Session")
    sessions = [[(b"host", b"x"), (b"x-session", b"%d" % number)] for number in range(20)]
    homes = [await rig.ask(headers=headers) for headers in sessions]
    assert len(set(homes)) == 3
    assert [await rig.ask(headers=headers) for headers in sessions] == homes
    gone = homes[0]
    rig.servers[gone].become(Phase.COMING)
    refuge = await rig.ask(headers=sessions[0])
    assert refuge != gone
    assert await rig.ask(headers=sessions[0]) == refuge
    others = [(headers, home) for headers, home in zip(sessions, homes, strict=True) if home != gone]
    assert [await rig.ask(headers=headers) for headers, _ in others] == [home for _, home in others]


async def test_requests_without_the_header_are_spread() -> None:
    rig = Rig(affinity="header:x-session")
    assert [await rig.ask(headers=[(b"host", b"x")]) for _ in range(3)] == [0, 1, 2]


async def test_a_conversation_goes_on_where_it_began() -> None:
    def turn(person: int, length: int) -> bytes:
        messages = [{"role": "user", "content": f"{person} {number} " + "x" * 600} for number in range(length)]
        return json.dumps({"model": "m", "messages": messages}).encode()

    rig = Rig(affinity="prefix")
    homes = [await rig.ask(turn(person, 1)) for person in range(6)]
    assert sorted(homes) == [0, 0, 1, 1, 2, 2]
    for length in range(2, 5):
        assert [await rig.ask(turn(person, length)) for person in range(6)] == homes
    rig.pool.begin(rig.replicas[homes[0]], Address("http", "a", 80))  # its cache is empty
    await rig.ask(b"{}")
    assert await rig.ask(turn(0, 5)) != homes[0]


async def test_one_prompt_for_all_does_not_fall_on_one() -> None:
    rig = Rig(affinity="prefix")
    async with AsyncExitStack() as stack:
        for _ in range(60):
            await stack.enter_async_context(rig.exchange(PROMPT))
        assert max(rig.in_flight) <= 26
        assert min(rig.in_flight) >= 8


# The end of a replica


async def test_draining_waits_for_those_inside() -> None:
    rig = Rig(1)
    order: list[str] = []

    async def drain() -> None:
        await rig.replicas[0].drain(60)
        order.append("drained")

    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(5):
            async with rig.exchange():
                async with rig.exchange():
                    tasks.start_soon(drain)
                    await anyio.wait_all_tasks_blocked()
                await anyio.wait_all_tasks_blocked()
                order.append("the last one leaves")
            await anyio.wait_all_tasks_blocked()
    assert order == ["the last one leaves", "drained"]
    assert not rig.replicas[0].is_cut


async def test_who_is_cut_is_told_why() -> None:
    rig = Rig(1)
    async with AsyncExitStack() as stack:
        response = await stack.enter_async_context(rig.exchange())
        chunks = response.body
        assert await anext(chunks) == b"one "
        await rig.replicas[0].drain(0)
        assert rig.replicas[0].is_cut
        rig.wires[0].breaks = UpstreamDisconnected("closed by the gateway")
        with pytest.raises(ShuttingDown, match="LLM model 'm' is being stopped"):  # noqa: PT012
            try:
                await anext(chunks)
            except UpstreamDisconnected as error:
                await stack.__aexit__(type(error), error, error.__traceback__)
    rig.pool.begin(rig.replicas[0], Address("http", "a", 80))
    with pytest.raises(UpstreamDisconnected):
        await rig.ask()


async def test_progress_is_bytes_and_ends() -> None:
    rig = Rig(1)
    async with rig.exchange() as response:
        assert rig.replicas[0].progress == 0
        assert [chunk async for chunk in response.body] == [b"one ", b"two"]
        assert rig.replicas[0].progress == 7
    assert rig.replicas[0].progress == 8


async def test_what_is_poured_is_progress_and_what_is_refused_is_not() -> None:
    rig = Rig(1)
    async with rig.exchange() as response:
        await response.pour(lambda piece: piece == b"taken")
        assert rig.replicas[0].progress == len(b"taken")


# WebSockets


async def test_websockets_are_spread_and_counted_too() -> None:
    rig = Rig(3)
    rig.wires[1].refuses = UpstreamUnavailable("no")
    open_websocket: Callable[[], AbstractAsyncContextManager[Any]] = lambda: rig.pool.open_websocket(  # noqa: E731
        b"/v1/realtime", HEADERS, max_message=1024
    )
    async with open_websocket() as first, open_websocket() as second:
        assert [first[0], second[0]] == [(b"host", b"host0"), (b"host", b"host2")]
        assert rig.in_flight == [1, 0, 1]
        assert [replica.unanswered for replica in rig.replicas] == [0, 0, 0]
        async with rig.exchange():
            assert sum(replica.unanswered for replica in rig.replicas) == 1
    assert rig.in_flight == [0, 0, 0]
