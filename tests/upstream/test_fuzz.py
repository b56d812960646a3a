"""Answers that were tampered with, judged beside h11; and heads that are written from any headers."""

from __future__ import annotations

import h11
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from fluidmcp_proxy.errors import InvalidTarget, UpstreamInvalidResponse
from fluidmcp_proxy.upstream.answer import Answer
from fluidmcp_proxy.upstream.framing import encode_head, frame
from fluidmcp_proxy.upstream.headers import request_headers

from .test_boundaries import CHUNKS, CUTS, FIELDS, divide, encode

pytestmark = pytest.mark.fuzz

FRAGMENTS = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from([b"\r\n", b"\n", b"\r", b" ", b"0", b":", b";", b"0\r\n\r\n", b"\r\n\r\n", b"f" * 16 + b"\r\n"]),
    st.sampled_from([b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n"]),
    st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"]),
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.one_of(st.just(b""), FRAGMENTS)), max_size=3)


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """``data`` with bytes cut out and put in."""
    for place, length, new in edits:
        at = int(len(data) * place)
        data = data[:at] + new + data[at + length :]
    return data


def read_by_h11(data: bytes) -> tuple[int, bytes] | None:
    """Status and body, if they are complete before the end of the connection; None for what h11 does not accept."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1024 * 1024)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    status, body = 0, b""
    try:
        while True:
            event_ = connection.next_event()
            if isinstance(event_, h11.Response):
                status = event_.status_code
            elif isinstance(event_, h11.Data):
                body += event_.data
            elif isinstance(event_, h11.EndOfMessage):
                return status, body
            elif not isinstance(event_, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


@given(framing=st.sampled_from(["length", "chunked"]), fields=FIELDS, chunks=CHUNKS, cuts=CUTS, edits=EDITS)
def test_an_answer_that_was_tampered_with_is_refused_or_read_as_h11_reads_it(
    framing: str,
    fields: list[tuple[bytes, bytes]],
    chunks: list[bytes],
    cuts: list[int],
    edits: list[tuple[float, int, bytes]],
) -> None:
    data = edited(encode(framing, fields, chunks), edits)
    answer = Answer()
    try:
        for piece in divide(data, cuts):
            answer.feed(piece)
            if answer.complete:
                break
    except UpstreamInvalidResponse:
        event("refused")
        assert not answer.clean
        return
    if not answer.complete:
        event("waits for more")
        return
    event("complete")
    expected = read_by_h11(data)
    if expected is None:  # llhttp takes more of what means nothing: line ends before an answer, any byte in a reason
        event("complete, unlike h11")
        assert edits
    else:
        assert (answer.status, b"".join(answer.parts)) == expected


NAMES = st.one_of(
    st.sampled_from(
        [
            b"host",
            b"connection",
            b"te",
            b"upgrade",
            b"x-forwarded-for",
            b"forwarded",
            b"authorization",
            b"x_a",
            b"cookie",
        ]
    ),
    st.from_regex(rb"[a-z0-9!#$%&'*+.^`|~-]{1,8}", fullmatch=True),
)
VALUES = st.one_of(
    st.sampled_from([b"close", b"cookie, te", b"x-a,authorization", b" cookie\t"]),
    st.from_regex(rb"[ -~\t\x80-\xff]{0,12}", fullmatch=True),
)


@given(headers=st.lists(st.tuples(NAMES, VALUES), max_size=12))
def test_any_headers(headers: list[tuple[bytes, bytes]]) -> None:
    assume(all(name not in (b"content-length", b"transfer-encoding") for name, _ in headers))
    kept = request_headers(headers, host=b"up", client="1.2.3.4", scheme="http", request_id=b"id")
    names = [name for name, _ in kept]
    nominated = {
        token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")
    }
    assert [value for name, value in kept if name == b"host"] == [b"up"]
    for name in (b"x-forwarded-for", b"x-forwarded-proto", b"via", b"x-request-id"):
        assert name in names[-5:]
    assert not {b"connection", b"te", b"upgrade", b"forwarded", b"x_a"} & set(names)
    assert not nominated & set(names) - {
        b"host",
        b"via",
        b"x-request-id",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
    }
    through = [pair for pair in kept if pair in headers and pair[0] not in (b"host", b"via", b"x-request-id")]
    rest = iter(headers)
    assert all(pair in rest for pair in through if not pair[0].startswith(b"x-forwarded"))  # in their order
    head = encode_head(b"GET", b"/", frame(b"GET", b"/", kept, None).headers)
    server = h11.Connection(h11.SERVER)
    server.receive_data(head)
    request = server.next_event()
    assert isinstance(request, h11.Request)
    assert list(request.headers) == [(name, value.strip(b" \t")) for name, value in kept]
    assert isinstance(server.next_event(), h11.EndOfMessage)


@given(name=st.binary(max_size=12), value=st.binary(max_size=12), target=st.binary(max_size=12))
def test_no_bytes_make_a_second_line(name: bytes, value: bytes, target: bytes) -> None:
    try:
        head = encode_head(b"GET", b"/" + target, frame(b"GET", b"/" + target, [(name, value)], None).headers)
    except InvalidTarget:
        return
    assert head.split(b"\r\n") == [b"GET /" + target + b" HTTP/1.1", name + b": " + value, b"", b""]
    assert b"\n" not in head.replace(b"\r\n", b"")
    assert b"\r" not in head.replace(b"\r\n", b"")
