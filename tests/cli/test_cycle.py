"""One request under ``fluidmcp run``: what the app receives, and how its answer is written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl

from fluidmcp_proxy.cli.cycle import Cycle, writer_of
from tests.serving import DEADLINE

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Wire:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False
        self.reads = True

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written.append(data + b"")  # a str breaks here

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


class Over:
    """A connection; ``turn()`` is the end of a turn of its event loop."""

    def __init__(self, method: str = "GET", *, keep_alive: bool = True, expects_continue: bool = False) -> None:
        self.wire = self.transport = Wire()
        self.flow = FlowControl(self.wire)  # type: ignore[arg-type]
        self.soon: list[Callable[[], None]] = []
        self.loop = SimpleNamespace(call_soon=self.soon.append)
        self.completed = 0
        connection: Any = self
        self.cycle = Cycle(connection, {"method": method}, keep_alive=keep_alive, expects_continue=expects_continue)

    def on_response_complete(self) -> None:
        self.completed += 1

    def turn(self) -> None:
        while self.soon:
            self.soon.pop()()

    async def start(self, *headers: tuple[bytes, bytes], status: int = 200) -> None:
        await self.cycle.send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, body: Any = b"", more: bool = False) -> None:
        await self.cycle.send({"type": "http.response.body", "body": body, "more_body": more})


async def test_head_and_body_are_one_write() -> None:
    over = Over()
    await over.start((b"content-length", b"8"))
    await over.body(b"body", more=True)
    await over.body(b"more")
    over.turn()
    assert over.wire.written == [b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nbody", b"more"]
    assert over.completed == 1
    assert not over.wire.closed


async def test_a_head_alone_leaves_in_the_same_turn() -> None:
    over = Over()
    await over.start((b"content-length", b"2"))
    assert over.wire.written == []
    over.turn()
    assert over.wire.written == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"]
    await over.body(b"ok")
    assert over.wire.written[1:] == [b"ok"]


async def test_an_unknown_length_is_chunked() -> None:
    over = Over()
    await over.start((b"a", b"1"), (b"a", b"2"))
    await over.body(b"x" * 17, more=True)
    await over.body(b"", more=True)
    await over.body(b"y")
    head = b"HTTP/1.1 200 OK\r\na: 1\r\na: 2\r\ntransfer-encoding: chunked\r\n\r\n"
    assert b"".join(over.wire.written) == head + b"11\r\n" + b"x" * 17 + b"\r\n1\r\ny\r\n0\r\n\r\n"


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
@pytest.mark.parametrize("headers", [(), ((b"content-length", b"100"),)])
async def test_an_answer_without_a_body(method: str, status: int, headers: tuple[Any, ...]) -> None:
    over = Over(method)
    await over.start(*headers, status=status)
    await over.body(b"not this")
    [written] = over.wire.written
    assert written.endswith(b"\r\n\r\n")
    assert b"chunked" not in written
    assert over.completed == 1


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("said", [None, b"close", b"x, Close"])
async def test_a_connection_that_ends_says_so_once(keep_alive: bool, said: bytes | None) -> None:
    over = Over(keep_alive=keep_alive)
    await over.start((b"content-length", b"0"), *([(b"connection", said)] if said else []))
    await over.body()
    ends = not keep_alive or said is not None
    assert b"".join(over.wire.written).lower().count(b"close") == ends
    assert over.wire.closed == ends


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b", b"a\x7fb"])
async def test_no_header_breaks_the_head(value: bytes) -> None:
    over = Over()
    with pytest.raises(RuntimeError):
        await over.start((b"a", value))
    over.turn()
    assert over.wire.written == []


async def test_latin_1_and_tabs_are_no_controls() -> None:
    over = Over()
    await over.start((b"a", b"\xe9\tb"), (b"content-length", b"0"))
    await over.body()
    assert b"a: \xe9\tb\r\n" in over.wire.written[0]


@pytest.mark.parametrize("body", [b"", b"x", b"xxx"])
async def test_a_length_is_kept_to(body: bytes) -> None:
    over = Over()
    await over.start((b"content-length", b"2"))
    with pytest.raises(RuntimeError):
        await over.body(body)
    assert over.completed == 0


@pytest.mark.parametrize("headers", [(), ((b"content-length", b"99"),)], ids=["chunked", "framed"])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_body_that_cannot_be_encoded_aborts(headers: tuple[Any, ...], begun: bool) -> None:
    """The one way to abort through layers of middleware."""
    over = Over()

    async def app(*_: Any) -> None:
        await over.start(*headers)
        if begun:
            await over.body(b"begun", more=True)
        await over.body("aborted", more=True)

    await over.cycle.run_asgi(app)
    over.turn()
    assert over.wire.closed
    assert over.completed == 0
    assert b"aborted" not in b"".join(over.wire.written)
    assert not b"".join(over.wire.written).endswith(b"0\r\n\r\n")


async def test_a_head_that_was_held_leaves_before_the_end() -> None:
    over = Over()

    async def app(*_: Any) -> None:
        await over.start()

    await over.cycle.run_asgi(app)
    over.turn()
    assert over.wire.written == [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"]
    assert over.wire.closed


@pytest.mark.parametrize("fails", [True, False])
async def test_an_app_without_an_answer(
    fails: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # uvicorn's own is silenced by servers that other tests run.
    monkeypatch.setattr("fluidmcp_proxy.cli.cycle.logger", logging.getLogger("tests.cycle"))
    over = Over()

    async def app(*_: Any) -> None:
        if fails:
            raise ValueError

    await over.cycle.run_asgi(app)
    assert over.wire.written[0].startswith(b"HTTP/1.1 500 ")
    assert over.wire.closed
    assert len(caplog.records) == 1


async def test_after_the_end_nothing_can_be_sent() -> None:
    over = Over()
    with pytest.raises(RuntimeError):
        await over.body(b"first")
    await over.start((b"content-length", b"0"))
    with pytest.raises(RuntimeError):
        await over.start()
    await over.body()
    with pytest.raises(RuntimeError):
        await over.body()


async def test_a_client_that_left_is_sent_nothing() -> None:
    over = Over()
    await over.start()
    over.cycle.disconnect()
    over.turn()
    await over.body(b"x")
    assert over.wire.written == []


async def test_a_body_is_received_as_it_comes() -> None:
    over = Over()
    with anyio.fail_after(DEADLINE):
        over.cycle.feed(b"a")
        over.cycle.feed(b"b")
        assert await over.cycle.receive() == {"type": "http.request", "body": b"ab", "more_body": True}
        async with anyio.create_task_group() as tasks:
            received: list[Any] = []

            async def reader() -> None:
                received.append(await over.cycle.receive())
                over.cycle.disconnect()

            tasks.start_soon(reader)
            await anyio.wait_all_tasks_blocked()
            over.cycle.more_body = False
            over.cycle.feed(b"c")
        assert received == [{"type": "http.request", "body": b"c", "more_body": False}]
        for _ in range(2):
            assert await over.cycle.receive() == {"type": "http.disconnect"}


async def test_waiting_for_the_end_is_woken_by_it_and_can_be_given_up() -> None:
    over = Over()
    over.cycle.more_body = False
    over.cycle.tell()
    with anyio.fail_after(DEADLINE):
        await over.cycle.receive()
        with anyio.move_on_after(0):
            await over.cycle.receive()
        waits = asyncio.create_task(over.cycle.receive())
        await anyio.wait_all_tasks_blocked()
        await over.start((b"content-length", b"0"))
        await over.body()
        assert await waits == {"type": "http.disconnect"}


async def test_a_large_body_pauses_the_client_until_it_is_received() -> None:
    over = Over()
    over.cycle.feed(b"x" * HIGH_WATER_LIMIT)
    reads = [over.wire.reads]
    over.cycle.feed(b"y")
    reads.append(over.wire.reads)
    assert len((await over.cycle.receive())["body"]) == HIGH_WATER_LIMIT + 1
    assert [*reads, over.wire.reads] == [True, False, True]


async def test_who_expects_continue_is_told_when_the_body_is_wanted() -> None:
    over = Over("POST", expects_continue=True)
    over.cycle.feed(b"x")
    assert over.wire.written == []
    await over.cycle.receive()
    over.cycle.feed(b"y")
    await over.cycle.receive()
    assert over.wire.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    refused = Over("POST", expects_continue=True)
    await refused.start((b"content-length", b"0"))
    await refused.body()
    await refused.cycle.receive()
    assert b"100 Continue" not in b"".join(refused.wire.written)


async def test_a_piece_is_written_without_a_task() -> None:
    over = Over()
    await over.start()
    write = writer_of(over.cycle.send)
    assert write is not None
    assert not write(b"early")  # the head waits for the one that is sent
    await over.body(b"one", more=True)
    assert write(b"two")
    await over.body(b"")
    head, body = b"".join(over.wire.written).split(b"\r\n\r\n", 1)
    assert b"chunked" in head
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


async def test_no_piece_is_written_where_sending_would_wait_or_is_in_vain() -> None:
    over = Over()
    await over.start()
    await over.body(b"one", more=True)
    write, written = writer_of(over.cycle.send), list(over.wire.written)
    assert write is not None
    over.flow.pause_writing()
    assert not write(b"two")
    over.flow.resume_writing()
    over.cycle.disconnect()
    assert not write(b"two")
    assert over.wire.written == written


async def test_only_a_chunked_answer_that_has_begun_has_a_writer() -> None:
    assert writer_of(Over().cycle.send) is None
    with_length, head, empty, over = Over(), Over("HEAD"), Over(), Over()
    await with_length.start((b"content-length", b"8"))
    await head.start()
    await empty.start(status=204)
    await over.start()
    await over.body()
    for one in (with_length, head, empty, over):
        assert writer_of(one.cycle.send) is None


async def test_nobody_in_between_is_passed_by() -> None:
    over = Over()
    await over.start()

    async def wrapped(message: Any) -> None:
        await over.cycle.send(message)

    class Wrapping:
        async def send(self, message: Any) -> None:
            await over.cycle.send(message)

    assert writer_of(over.cycle.send) is not None
    for send in (wrapped, Wrapping().send, over.cycle.receive, over.cycle):
        assert writer_of(send) is None
