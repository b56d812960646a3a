"""Events cut at their boundaries."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidmcp_proxy.gateway.sse import MAX_TAIL_BYTES, EventSplitter, is_event_stream


def test_whole_events_pass_at_once() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert splitter.feed(b"data: 2\n\ndata: 3\n\n") == b"data: 2\n\ndata: 3\n\n"
    assert splitter.at_boundary
    assert splitter.rest() == b""


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_an_unfinished_event_waits_for_its_rest(end: bytes) -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1" + end + b"data: 2") == b"data: 1" + end
    assert splitter.feed(end[:1]) == b""
    assert splitter.feed(end[1:]) == b"data: 2" + end
    assert splitter.at_boundary


def test_a_tail_without_end_is_passed_on() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"x" * MAX_TAIL_BYTES) == b""
    assert splitter.feed(b"y") == b"x" * MAX_TAIL_BYTES + b"y"
    assert not splitter.at_boundary
    assert splitter.feed(b"z\n\n") == b"z\n\n"
    assert splitter.at_boundary


def test_done_is_seen_in_the_last_event_only() -> None:
    splitter = EventSplitter()
    splitter.feed(b"data: 1\n\ndata: [DO")
    assert not splitter.is_done
    splitter.feed(b"NE]\n\n")
    assert splitter.is_done


def test_nothing_sent_is_a_boundary() -> None:
    splitter = EventSplitter()
    splitter.feed(b"data: 1")
    assert splitter.at_boundary
    assert splitter.rest() == b"data: 1"


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_no_byte_is_lost_and_every_piece_ends_at_a_boundary(data: bytes, cuts: list[int]) -> None:
    data = re.sub(rb"[^\r\n]", b"d", data)  # mostly line ends
    edges = [0, *sorted(cuts), len(data)]
    splitter = EventSplitter()
    pieces = [splitter.feed(data[a:b]) for a, b in pairwise(edges)]
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) for piece in pieces if piece)
    assert b"".join(pieces) + splitter.rest() == data


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"content-type", b"text/event-stream")], True),
        ([(b"content-type", b"Text/Event-Stream; charset=utf-8")], True),
        ([(b"content-type", b"text/event-stream"), (b"content-encoding", b"identity")], True),
        ([(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")], False),
        ([(b"content-type", b"application/json")], False),
        ([], False),
    ],
)
def test_is_event_stream(headers: list[tuple[bytes, bytes]], expected: bool) -> None:
    assert is_event_stream(headers) is expected
