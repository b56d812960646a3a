"""Which headers cross the gateway, as tables."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidmcp_proxy.upstream.headers import pick_request_id, request_headers, response_headers

Pairs = list[tuple[bytes, bytes]]

OURS = [
    (b"x-forwarded-for", b"10.0.0.9"),
    (b"x-forwarded-proto", b"https"),
    (b"via", b"1.1 fluidmcp"),
    (b"x-request-id", b"id"),
]


def forwarded(headers: Pairs, **options: object) -> Pairs:
    """What is left of ``headers``, without what the gateway always sets."""
    arguments: dict[str, object] = {"host": b"up:1", "client": "10.0.0.9", "scheme": "https", "request_id": b"id"}
    result = request_headers(headers, **{**arguments, **options})  # type: ignore[arg-type]
    assert result[0] == (b"host", b"up:1")
    for pair in OURS:
        assert result.count(pair) == 1
        result.remove(pair)
    return result[1:]


GONE = [
    (b"connection", b"keep-alive"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-connection", b"keep-alive"),
    (b"te", b"trailers"),
    (b"trailer", b"x-a"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
    (b"http2-settings", b"AAMAAABk"),
    (b"proxy-authorization", b"Basic x"),
    (b"proxy-authenticate", b"Basic"),
    (b"expect", b"100-continue"),
    (b"forwarded", b"for=1.1.1.1"),
    (b"x-real-ip", b"1.1.1.1"),
    (b"x-forwarded-for", b"1.1.1.1"),
    (b"x-forwarded-proto", b"http"),
    (b"x-forwarded-host", b"evil"),
    (b"x-forwarded-prefix", b"/evil"),
    (b"x-forwarded-anything", b"evil"),
    (b"x-request-id", b"theirs"),
    (b"x_forwarded_for", b"1.1.1.1"),
    (b"x_api_key", b"k"),
    (b"content_length", b"5"),
]

STAY = [
    (b"accept", b"text/event-stream"),
    (b"accept-encoding", b"gzip"),
    (b"authorization", b"Bearer theirs"),
    (b"content-type", b"application/json"),
    (b"content-length", b"5"),
    (b"content-encoding", b"zstd"),
    (b"cookie", b"a=b"),
    (b"user-agent", b"OpenAI/Python"),
    (b"x-api-key", b"k"),
    (b"x-stainless-retry-count", b"0"),
    (b"x-forwardedfor", b"not one of ours"),
    (b"traceparent", b"00-1-2-01"),
    (b"prefer", b"wait=5"),
    (b"origin", b"http://a"),
]


@pytest.mark.parametrize("pair", GONE, ids=lambda pair: pair[0].decode())
def test_request_header_that_stays_here(pair: tuple[bytes, bytes]) -> None:
    assert forwarded([pair]) == []


@pytest.mark.parametrize("pair", STAY, ids=lambda pair: pair[0].decode())
def test_request_header_that_is_forwarded(pair: tuple[bytes, bytes]) -> None:
    assert forwarded([pair, pair]) == [pair, pair]


@pytest.mark.parametrize(
    ("connection", "gone"),
    [
        ([b"x-a"], {b"x-a"}),
        ([b"close, X-A ,\tx-b"], {b"x-a", b"x-b"}),
        ([b"x-a", b"x-b"], {b"x-a", b"x-b"}),
        ([b""], set()),
        ([b",,"], set()),
        ([b"keep-alive"], set()),
        ([b"authorization, cookie"], {b"authorization", b"cookie"}),
    ],
)
def test_what_connection_names_goes_both_ways(connection: list[bytes], gone: set[bytes]) -> None:
    rest = [(b"x-a", b"1"), (b"authorization", b"2"), (b"x-b", b"3"), (b"cookie", b"4"), (b"x-a", b"5")]
    headers = [rest[0], *[(b"connection", value) for value in connection], *rest[1:]]
    kept = [pair for pair in rest if pair[0] not in gone]
    assert forwarded(headers) == kept
    assert response_headers(headers, request_id=b"id") == [*kept, (b"x-request-id", b"id")]


@pytest.mark.parametrize("name", [pair[0] for pair in OURS] + [b"host", b"authorization"])
def test_connection_cannot_remove_what_the_gateway_says(name: bytes) -> None:
    result = request_headers(
        [(b"connection", name), (b"host", b"gateway")],
        host=b"up:1",
        client="10.0.0.9",
        scheme="https",
        request_id=b"id",
        authorization=b"Bearer ours",
    )
    assert [value for found, value in result if found == name] == [
        dict([*OURS, (b"host", b"up:1"), (b"authorization", b"Bearer ours")])[name]
    ]


def test_host_is_the_upstreams_and_the_clients_is_told() -> None:
    assert forwarded([(b"host", b"gateway:8099")]) == [(b"x-forwarded-host", b"gateway:8099")]


def test_an_unknown_client_is_not_invented() -> None:
    result = request_headers([], host=b"h", client=None, scheme="http", request_id=b"id")
    assert b"x-forwarded-for" not in dict(result)


def test_via_is_added_to_what_other_proxies_said() -> None:
    result = request_headers(
        [(b"via", b"1.0 fred")], host=b"h", client=None, scheme="http", request_id=b"id", http_version="1.0"
    )
    assert [value for name, value in result if name == b"via"] == [b"1.0 fred", b"1.0 fluidmcp"]


def test_the_models_key_replaces_the_clients() -> None:
    headers = [(b"authorization", b"Bearer theirs"), (b"x-a", b"1"), (b"authorization", b"Bearer more")]
    assert forwarded(headers, authorization=b"Bearer ours") == [(b"x-a", b"1"), (b"authorization", b"Bearer ours")]


def test_the_gateways_own_key_stays_here() -> None:
    headers = [(b"authorization", b"Bearer gateway"), (b"x-api-key", b"theirs")]
    assert forwarded(headers, drop={b"authorization"}) == [(b"x-api-key", b"theirs")]
    assert forwarded(headers, drop=[b"x-api-key"]) == [(b"authorization", b"Bearer gateway")]


@pytest.mark.parametrize(
    "value", [b"a", b"A-Z_0.9", b"x" * 128, b"123e4567-e89b-12d3-a456-426614174000"], ids=lambda value: value.decode()
)
def test_request_id_that_is_kept(value: bytes) -> None:
    assert pick_request_id([(b"x-request-id", value)]) == value


@pytest.mark.parametrize(
    "values", [[], [b""], [b"x" * 129], [b"a b"], [b"a\n"], [b"a,b"], [b"\xe4"], [b"<b>"], [b"a", b"b"], [b"a", b"a"]]
)
def test_request_id_that_is_made_new(values: list[bytes]) -> None:
    headers = [(b"x-request-id", value) for value in values]
    made = {pick_request_id(headers) for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(rb"[0-9a-f]{32}", value) for value in made)


def test_response_keeps_order_repetition_and_case_of_values() -> None:
    headers = [
        (b"server", b"uvicorn"),
        (b"set-cookie", b"A=1"),
        (b"x_underscore", b"kept"),
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"set-cookie", b"B=2"),
        (b"via", b"1.1 other"),
        (b"content-length", b"5"),
        (b"content-encoding", b"gzip"),
    ]
    hop = [(b"connection", b"close"), (b"transfer-encoding", b"chunked"), (b"keep-alive", b"timeout=5")]
    mixed = [headers[0], hop[0], *headers[1:4], hop[1], *headers[4:], hop[2], (b"x-request-id", b"theirs")]
    assert response_headers(mixed, request_id=b"ours") == [*headers, (b"x-request-id", b"ours")]


NAMES = st.one_of(
    st.sampled_from([name for name, _ in GONE + STAY]), st.from_regex(rb"[a-z][a-z0-9_-]{0,12}", fullmatch=True)
)
HEADERS = st.lists(st.tuples(NAMES, st.from_regex(rb"[ -~]{0,12}", fullmatch=True)), max_size=12)


@given(headers=HEADERS)
def test_forwarding_twice_is_like_forwarding_once(headers: Pairs) -> None:
    """Nothing that a client sends can survive one hop and be stripped, or trusted, by the next."""
    once = forwarded(headers)
    assert forwarded(once) == [pair for pair in once if not pair[0].startswith(b"x-forwarded-")]
    assert [pair for pair in headers if pair in once] == [pair for pair in once if pair in headers]


@given(headers=HEADERS)
def test_lists_and_iterators_give_the_same_and_nothing_is_changed(headers: Pairs) -> None:
    before = list(headers)
    assert forwarded(headers) == forwarded(iter(headers))  # type: ignore[arg-type]
    assert response_headers(headers, request_id=b"i") == response_headers(iter(headers), request_id=b"i")
    assert headers == before
