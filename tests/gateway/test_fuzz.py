"""Any path, any division of any body: what is let through arrives as it was meant, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from fluidmcp_proxy.errors import GatewayError, RequestTooLarge
from fluidmcp_proxy.gateway.body import RequestBody
from fluidmcp_proxy.gateway.routes import Forward
from fluidmcp_proxy.gateway.routing import Router
from fluidmcp_proxy.gateway.target import read_target
from tests.gateway.conftest import remote
from tests.gateway.test_server_nonsense import EVENTS
from tests.upstream.scripted import Peer, serve
from tests.upstream.test_boundaries import CHUNKS, CUTS, FIELDS, FRAMINGS, divide, encode

pytestmark = pytest.mark.fuzz

Message = MutableMapping[str, Any]

PIECES = st.one_of(
    st.sampled_from(
        rb"/ // m v1 . .. % %2e %2E %2f %5C %00 %25 %32 2e 2f \ ? # @ sleep metrics tokenize ; %ff".split()
    ),
    st.sampled_from([b" ", b"\xc3\xa9"]),
    st.binary(min_size=1, max_size=2),
)
PATHS = st.lists(PIECES, max_size=10).map(b"".join)
PREFIXES = st.sampled_from([b"", b"/", b"/m/", b"/m/v1/", b"/mount/m/v1/"])
ROUTER = Router(remote(1).config.models)
OPEN = (b"tokenize", b"detokenize", b"rerank", b"score", b"classify", b"pooling")


@given(prefix=PREFIXES, rest=PATHS, method=st.sampled_from(["GET", "POST"]), root=st.sampled_from(["", "/mount"]))
@example(prefix=b"/m/v1/", rest=b"%252e%252e/metrics", method="GET", root="")
@example(prefix=b"/m/v1/", rest=b"%25%32%65./metrics", method="GET", root="")
@example(prefix=b"/m/v1/", rest=b"%2573leep", method="POST", root="")
def test_nothing_is_forwarded_that_means_something_else_decoded_again(
    prefix: bytes, rest: bytes, method: str, root: str
) -> None:
    raw, _, query = (prefix + rest).partition(b"?")
    path = unquote_to_bytes(raw).decode("utf-8", "replace")
    scope = {"type": "http", "path": path, "raw_path": raw, "query_string": query, "root_path": root}
    try:
        route = ROUTER.route(method, read_target(scope))
    except GatewayError as refusal:
        event(f"{refusal.status}")
        return
    if not isinstance(route, Forward):
        return
    event("forwarded")
    assert route.model == "m"
    forwarded, _, asked = route.target.partition(b"?")
    assert asked == query
    assert raw.endswith(forwarded)
    decoded = unquote_to_bytes(forwarded)
    assert unquote_to_bytes(decoded) == decoded
    segments = decoded.split(b"/")
    assert segments[0] == b""
    assert segments[1] == b"v1" or (len(segments) == 2 and segments[1] in OPEN)
    assert len(segments) == forwarded.count(b"/") + 1
    assert not {b".", b".."} & set(segments)
    assert not {b"sleep", b"metrics"} & set(segments[1:3])
    assert not {0, ord("\\")} & set(decoded)


@given(
    pieces=st.lists(st.integers(0, 70_000), max_size=8),
    limit=st.integers(0, 300_000),
    declares=st.booleans(),
    empty_end=st.booleans(),
)
def test_a_body_arrives_whole_or_is_too_large(pieces: list[int], limit: int, declares: bool, empty_end: bool) -> None:
    data = [bytes([number % 256]) * size for number, size in enumerate(pieces)]
    whole = b"".join(data)
    ends = [*data, b""] if empty_end or not data else data
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": piece, "more_body": n < len(ends) - 1} for n, piece in enumerate(ends)]
    )

    async def receive() -> Message:
        return next(messages)

    async def read() -> bytes:
        length = (b"content-length", b"%d" % len(whole))
        body = RequestBody(receive, [length if declares else (b"transfer-encoding", b"chunked")], limit, 60)
        content = await body.start()
        if isinstance(content, bytes):
            return content
        assert content is not None
        return b"".join([piece async for piece in content])

    if len(whole) > limit:
        with pytest.raises(RequestTooLarge):
            asyncio.run(read())
    else:
        assert asyncio.run(read()) == whole


@contextmanager
def heard(method: str = "POST", body: bytes = b"", cuts: list[int] | None = None) -> Iterator[Any]:
    """A request in pieces, and a list of what is sent back."""
    pieces = list(divide(body, cuts or [])) or [b""]
    messages = iter(
        [{"type": "http.request", "body": piece, "more_body": n < len(pieces) - 1} for n, piece in enumerate(pieces)]
    )
    said: list[Message] = []

    async def receive() -> Message:
        message: Message | None = next(messages, None)
        if message is None:
            await asyncio.Event().wait()
        assert message is not None
        return message

    async def send(message: Message) -> None:
        said.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": "/m/v1/x",
        "raw_path": b"/m/v1/x",
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"host", b"x"), (b"content-length", b"%d" % len(body))],
    }
    yield scope, receive, send, said


@given(
    framing=FRAMINGS,
    fields=FIELDS,
    chunks=st.one_of(CHUNKS, st.just(EVENTS)),
    cuts=CUTS,
    events=st.booleans(),
    upload=st.binary(max_size=300),
    end=st.one_of(st.just(1.0), st.floats(0, 0.999)),
)
def test_what_goes_in_at_the_server_comes_out_at_the_client(
    framing: str,
    fields: list[tuple[bytes, bytes]],
    chunks: list[bytes],
    cuts: list[int],
    events: bool,
    upload: bytes,
    end: float,
) -> None:
    kind = [(b"content-type", b"text/event-stream" if events else b"application/octet-stream")]
    answer = encode(framing, kind + fields, chunks)
    received, said, broken = asyncio.run(_exchange(answer[: int(len(answer) * end)], cuts, upload))
    assert received == upload
    if not said or said[0]["status"] != 200:
        assert end < 1
        assert said[0]["status"] == 502
        return
    names = {name for name, _ in fields}
    assert [pair for pair in said[0]["headers"] if pair[0] in names] == fields
    parts = [message["body"] for message in said[1:] if isinstance(message["body"], bytes)]
    told = b"".join(parts)
    whole = b"".join(chunks)
    if framing == "until the end" or end == 1:
        # Where the end of the connection ends the body, a cut cannot be told from it.
        assert not broken
        assert not said[-1]["more_body"]
        assert told == whole if end == 1 else whole.startswith(told)
    else:
        assert broken
        assert all(message["more_body"] for message in said[1:])
        told, _, error = told.partition(b'data: {"error"')
        assert whole.startswith(told)
        assert events or not error


async def _exchange(answer: bytes, cuts: list[int], upload: bytes) -> tuple[bytes, list[Message], bool]:
    uploads: list[bytes] = []

    async def script(peer: Peer) -> None:
        head = await peer.head()
        if not head.startswith(b"POST /v1/x "):
            return  # the probe
        uploads.append(await peer.body(len(upload)))
        for piece in divide(answer, cuts):
            await peer.send(piece)

    async with serve(script) as server, remote(server.address.port).run() as gateway:
        with heard(body=upload, cuts=cuts) as (scope, receive, send, said):
            broken = False
            try:
                await gateway(scope, receive, send)
            except Exception:
                broken = True
        return uploads[0], said, broken
