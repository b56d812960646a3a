"""Wherever an answer is divided, and wherever it is cut: what goes in at the server comes out, or an error.

The oracle is the list of chunks from which the answer was made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import anyio
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamError, UpstreamInvalidResponse
from fluidmcp_proxy.upstream.answer import Answer

from .scripted import Peer, ask, connect, serve

CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
FIELDS = st.lists(
    st.tuples(
        st.from_regex(rb"x-[a-z0-9]{1,8}", fullmatch=True),
        st.from_regex(rb"([!-~\x80-\xff]([ -~\x80-\xff]{0,10}[!-~\x80-\xff])?)?", fullmatch=True),
    ),
    max_size=5,
)
CUTS = st.lists(st.integers(0, 400), max_size=12)
FRAMINGS = st.sampled_from(["length", "chunked", "until the end"])


def encode(framing: str, fields: list[tuple[bytes, bytes]], chunks: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in fields)
    body = b"".join(chunks)
    if framing == "length":
        return head + b"content-length: %d\r\n\r\n" % len(body) + body
    if framing == "chunked":
        coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        return head + b"transfer-encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"
    return head + b"\r\n" + body


def divide(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({0, len(data), *[cut for cut in cuts if cut < len(data)]})
    for start, end in pairwise(places):
        yield data[start:end]


@settings(max_examples=300)
@given(framing=FRAMINGS, fields=FIELDS, chunks=CHUNKS, cuts=CUTS)
@example(framing="chunked", fields=[(b"x-a", b"")], chunks=[b"\r\n0\r\n\r\n"], cuts=list(range(120)))
def test_division_changes_nothing(
    framing: str, fields: list[tuple[bytes, bytes]], chunks: list[bytes], cuts: list[int]
) -> None:
    answer = Answer()
    for _ in range(2):
        answer.begin(head_only=False)
        for piece in divide(encode(framing, fields, chunks), cuts):
            answer.feed(piece)
        if framing == "until the end":
            assert not answer.complete
            assert answer.feed_eof()
        assert (answer.status, answer.reason, answer.complete, answer.head_done) == (200, b"OK", True, True)
        assert answer.headers[: len(fields)] == fields
        assert b"".join(answer.parts) == b"".join(chunks)
        if framing == "until the end":
            assert not answer.clean
            return
        assert answer.clean


@settings(max_examples=300)
@given(framing=st.sampled_from(["length", "chunked"]), fields=FIELDS, chunks=CHUNKS, cuts=CUTS, end=st.floats(0, 0.999))
def test_a_cut_answer_is_never_complete(
    framing: str, fields: list[tuple[bytes, bytes]], chunks: list[bytes], cuts: list[int], end: float
) -> None:
    data = encode(framing, fields, chunks)
    answer = Answer()
    for piece in divide(data[: int(len(data) * end)], cuts):
        answer.feed(piece)
    assert not answer.complete
    assert not answer.feed_eof()
    assert b"".join(chunks).startswith(b"".join(answer.parts))


@settings(max_examples=300)
@given(chunks=CHUNKS, surplus=st.binary(min_size=1, max_size=60), cuts=CUTS)
@example(chunks=[b"a"], surplus=b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nb", cuts=[])
def test_surplus_changes_nothing_and_ends_the_connection(chunks: list[bytes], surplus: bytes, cuts: list[int]) -> None:
    answer = Answer()
    answer.begin(head_only=False)
    for piece in divide(encode("length", [], chunks) + surplus, cuts):
        if answer.complete:
            break  # the connection closes at the first byte
        answer.feed(piece)
    else:
        assert not answer.clean or not surplus.strip(b"\r\n")
    assert answer.complete
    assert b"".join(answer.parts) == b"".join(chunks)


@settings(max_examples=500)
@given(data=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda rest: b"HTTP/1.1 200 OK\r\n" + rest)))
def test_any_bytes_are_an_answer_or_refused(data: bytes) -> None:
    answer = Answer()
    answer.begin(head_only=False)
    try:
        answer.feed(data)
    except UpstreamInvalidResponse:
        assert not answer.clean
        assert not answer.complete


@pytest.mark.parametrize("size", [60_000, 70_000])
@pytest.mark.parametrize("pieces", [1, 2, 50])
def test_the_limit_of_a_head_is_the_same_however_it_is_divided(size: int, pieces: int) -> None:
    answer = Answer()
    data = encode("length", [(b"x-a", b"a" * size)], [b"ok"])
    refused = False
    try:
        for piece in divide(data, [len(data) * n // pieces for n in range(pieces)]):
            answer.feed(piece)
    except UpstreamInvalidResponse:
        refused = True
    assert refused == (size > 64 * 1024)
    assert answer.complete != refused


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(framing=FRAMINGS, chunks=CHUNKS, cuts=CUTS)
def test_over_sockets(framing: str, chunks: list[bytes], cuts: list[int]) -> None:
    asyncio.run(_over_sockets(framing, chunks, cuts))


async def _over_sockets(framing: str, chunks: list[bytes], cuts: list[int]) -> None:
    async def script(peer: Peer) -> None:
        while await peer.head():
            for piece in divide(encode(framing, [], chunks), cuts):
                await peer.send(piece)
                await anyio.lowlevel.checkpoint()
            if framing == "until the end":
                return

    async with serve(script) as server:
        for wire in ("raw", "httpx"):
            async with connect(server, wire) as transport:
                for _ in range(2):
                    assert (await ask(transport)).body == b"".join(chunks)


STREAM = encode("chunked", [(b"content-type", b"text/event-stream")], [b"data: %d\n\n" % i for i in range(3)])


@pytest.mark.anyio
@pytest.mark.parametrize("wire", ["raw", "httpx-trio"], indirect=True)
async def test_a_stream_cut_at_every_byte(wire: str) -> None:
    async def script(peer: Peer) -> None:
        target = (await peer.head()).split()[1]
        await peer.send(STREAM[: int(target[1:])])

    async with serve(script) as server, connect(server, wire) as transport:
        for cut in range(len(STREAM)):
            received = b""
            error: UpstreamError | None = None
            try:
                async with transport.exchange(b"GET", b"/%d" % cut, [(b"host", b"x")]) as answer:
                    async for chunk in answer.body:
                        received += chunk
            except UpstreamError as raised:
                error = raised
            assert type(error) is UpstreamDisconnected, cut
            assert b"data: 0\n\ndata: 1\n\ndata: 2\n\n".startswith(received)
