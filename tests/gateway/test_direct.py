"""Under ``fluidmcp run`` an answer's bytes are passed on as they arrive, without waking a task: every promise stays."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.cli.cycle import Cycle
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway.record import RequestRecord
from tests.gateway.conftest import remote
from tests.gateway.test_leaving import asking, stats
from tests.gateway.test_truncation import LAST_CHUNK, ask, unchunked
from tests.serving import DEADLINE, eventually, serving, stub

SERVER = "uvicorn-run"
Message = Any


class Writes:
    """What went the direct way."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pieces: list[bytes] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.refused = 0
        write = Cycle.write

        def counted(cycle: Cycle, piece: bytes) -> bool:
            taken = write(cycle, piece)
            self.loop = asyncio.get_running_loop()
            if taken:
                self.pieces.append(piece)
            else:
                self.refused += 1
            return taken

        patch.setattr(Cycle, "write", counted)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """A server that nobody else leaves."""
    with stub() as port:
        yield port


@pytest.fixture(scope="module")
def port(upstream: int) -> Iterator[int]:
    with serving(remote(upstream), SERVER) as port:
        yield port


@pytest.fixture
def pace(tmp_path: Path) -> str:
    """What an answer is paced by that is read ``in_step``."""
    return str(tmp_path / "pace")


def in_step(port: int, head: str, body: bytes, pace: str, mark: bytes = b"data: ") -> bytes:
    """The body of a chunked answer of which nothing is made before what was made last is here: no two are one piece.

    Each piece has one ``mark``.
    """
    request = f"{head}\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(request.encode() + body)
        Path(pace).write_bytes(b"x")
        while data := connection.recv(65536):
            received += data
            Path(pace).write_bytes(b"x" * (1 + received.count(mark)))
    return received.partition(b"\r\n\r\n")[2]


def stream_in_step(port: int, pace: str, **knobs: Any) -> bytes:
    asked = {"model": "m", "max_tokens": 20, "stream": True, "messages": []}
    body = json.dumps({**asked, "stub": {"paced-by": pace, **knobs}}).encode()
    return in_step(port, "POST /m/v1/chat/completions HTTP/1.1", body, pace)


def events(body: bytes) -> list[bytes]:
    *whole, rest = body.split(b"\n\n")
    assert rest == b""
    return whole


def test_a_stream_is_whole_and_goes_the_direct_way(port: int, writes: Writes, pace: str) -> None:
    body = stream_in_step(port, pace)
    assert body.endswith(LAST_CHUNK)
    data = unchunked(body)
    assert events(data)[-1] == b"data: [DONE]"
    assert len(writes.pieces) > 5
    for piece in writes.pieces:
        assert piece in data


@pytest.mark.parametrize("replicas", [1, 2])
def test_it_is_accounted_for_as_ever(upstream: int, writes: Writes, pace: str, replicas: int) -> None:
    records: list[RequestRecord] = []
    with contextlib.ExitStack() as stack:
        ports = [upstream, stack.enter_context(stub())][:replicas]
        entry = {"endpoints": [{"base_url": f"http://127.0.0.1:{port}/v1"} for port in ports]}
        gateway = Gateway(parse_config({"llmModels": {"m": entry}}, environ={}), report=records.append)
        port = stack.enter_context(serving(gateway, SERVER))
        body = stream_in_step(port, pace)
        eventually(lambda: records, "the record")
    data = unchunked(body)
    assert records[0].outcome == "complete"
    assert records[0].bytes == len(data)
    assert len(writes.pieces) < records[0].chunks <= len(events(data))
    assert writes.pieces


def test_a_send_in_between_sees_every_piece(upstream: int, writes: Writes) -> None:
    gateway = remote(upstream)
    seen: list[bytes] = []

    async def between(scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        async def watched(message: Message) -> None:
            seen.append(message.get("body", b""))
            await send(message)

        await gateway(scope, receive, watched if scope["type"] == "http" else send)

    with serving(between, SERVER) as port:
        _, body, _ = ask(port, token_interval=0.002)
    assert unchunked(body) == b"".join(seen)
    assert body.endswith(LAST_CHUNK)
    assert not writes.pieces


@pytest.mark.parametrize("cut_after", range(1, 700, 23))
def test_cut_anywhere(port: int, cut_after: int) -> None:
    _, body, _ = ask(port, cut_after=cut_after, token_interval=0.001)
    assert not body.endswith(LAST_CHUNK)
    *whole, last = events(unchunked(body))
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_disconnected"
    for event in whole:
        assert "choices" in json.loads(event.removeprefix(b"data: "))


def replay(port: int, content: bytes, piece: int, media: str = "text/event-stream") -> bytes:
    url = f"http://127.0.0.1:{port}/m/v1/replay?piece={piece}&interval=0.001&type={media}"
    return httpx.post(url, content=content, trust_env=False, timeout=DEADLINE).content


@pytest.mark.parametrize("piece", [1, 3, 10, 14, 64, 10_000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\nunfinished"])
def test_nothing_is_lost_however_the_events_are_divided(port: int, piece: int, end: bytes) -> None:
    content = b"".join(b"data: %04d\n\n" % number for number in range(12)) + b"data: last" + end
    assert replay(port, content, piece) == content


def test_a_body_of_another_kind(port: int, writes: Writes, pace: str) -> None:
    content = bytes(range(256)) * 4
    head = f"POST /m/v1/replay?piece=256&type=audio/mpeg HTTP/1.1\r\nx-stub-paced-by: {pace}"
    assert unchunked(in_step(port, head, content, pace, mark=b"\xff")) == content
    assert writes.pieces


def test_a_reader_that_stops_stops_the_server_and_loses_nothing(upstream: int, writes: Writes) -> None:
    size = 60_000_000
    path = f"/v1/bytes/{size}?chunked=1"
    gateway = remote(upstream)
    with serving(gateway, SERVER) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(DEADLINE)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET /m{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = bytearray(connection.recv(1000))
        assert gateway._fleet is not None
        scheduler = gateway._fleet.scheduler
        samples: list[int] = []

        def has_stopped() -> bool:
            samples.append(scheduler.progress("m"))
            return writes.refused > 0 and len(samples) > 20 and len(set(samples[-20:])) == 1

        eventually(has_stopped, "no more is taken")
        assert 0 < samples[-1] < size / 4
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while data := connection.recv(1 << 20):
            received += data
    body = bytes(received).partition(b"\r\n\r\n")[2]
    assert body.endswith(LAST_CHUNK)
    direct = httpx.get(f"http://127.0.0.1:{upstream}{path}", trust_env=False, timeout=DEADLINE).content
    assert hashlib.sha256(quickly_unchunked(body)).digest() == hashlib.sha256(direct).digest()


def quickly_unchunked(body: bytes) -> bytes:
    parts, at = [], 0
    while size := int(body[at : (end := body.index(b"\r\n", at))], 16):
        parts.append(body[end + 2 : end + 2 + size])
        at = end + size + 4
    return b"".join(parts)


def test_a_client_that_leaves_ends_it(port: int, upstream: int, writes: Writes) -> None:
    eventually(lambda: stats(upstream)["running"] == 0, "those before have left")
    before = stats(upstream)["aborted"]
    with asking(port, stream=True, max_tokens=100_000, stub={"token-interval": 0.005}) as connection:
        while not writes.pieces:
            assert connection.recv(65536), "the stream ended"
        assert stats(upstream)["running"] == 1
    eventually(lambda: stats(upstream)["running"] == 0, "the request is gone")
    assert stats(upstream)["aborted"] == before + 1


def test_a_silence_that_lasts_too_long(upstream: int, writes: Writes, pace: str) -> None:
    with serving(remote(upstream, stream_idle_timeout=1), SERVER) as port:
        body = stream_in_step(port, pace, **{"hang-after": 10})
    assert not body.endswith(LAST_CHUNK)
    assert json.loads(events(unchunked(body))[-1].removeprefix(b"data: "))["error"]["code"] == "upstream_timeout"
    assert writes.pieces


def test_a_stream_that_is_cut_by_the_end_of_the_gateway(upstream: int, writes: Writes, pace: str) -> None:
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}
    document = {"llmModels": {"m": entry}, "gateway": {"drain_timeout": 0.2}}
    gateway = Gateway(parse_config(document, environ={}))
    answers: list[bytes] = []

    def read(port: int) -> None:
        answers.append(stream_in_step(port, pace, **{"hang-after": 15}))

    with serving(gateway, SERVER) as port:
        reader = threading.Thread(target=read, args=(port,))
        reader.start()
        eventually(lambda: writes.pieces, "the stream")
        assert writes.loop is not None
        writes.loop.call_soon_threadsafe(gateway.begin_shutdown)  # as fluidmcp run does
        reader.join(DEADLINE)
    assert not answers[0].endswith(LAST_CHUNK)
    assert json.loads(events(unchunked(answers[0]))[-1].removeprefix(b"data: "))["error"]["code"] == "shutting_down"
