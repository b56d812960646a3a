"""The model's name in a multipart form: what Starlette's parser sees there, however the body is cut."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.gateway.form_scanner import FormScanner, boundary_of
from fluidmcp_proxy.gateway.model_name import MAX_NAME_BYTES, Place

CUTS = st.lists(st.integers(0, 5000), max_size=8)
BINARY = st.binary(max_size=60) | st.text("\r\n-b", max_size=60).map(str.encode)


def find(body: bytes, cuts: list[int] | None = None, boundary: bytes = b"b") -> Place | None:
    finder = FormScanner(boundary)
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts or []), len(body)]
    for start, end in itertools.pairwise(places):
        finder.feed(body[start:end])
    finder.close()
    return finder.place


def part(disposition: str, content: bytes, more: str = "") -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {disposition}\r\n{more}\r\n".encode() + content + b"\r\n"


@given(BINARY, BINARY, st.text(max_size=20), st.booleans(), CUTS)
def test_the_forms_of_httpx(file: bytes, other: bytes, name: str, model_last: bool, cuts: list[int]) -> None:
    files: list[Any] = [
        ("file", ("a.wav", file, "audio/wav")),
        ("model", (None, name.encode())),
        ("prompt", (None, other)),
    ]
    if model_last:
        files = [*files[::-1][1:], files[-1]]
    request = httpx.Request("POST", "http://x", files=files)
    boundary = boundary_of(request.headers["content-type"].encode())
    assert boundary is not None
    body = request.read()
    place = find(body, cuts, boundary)
    assert place is not None
    assert body[place.start : place.end] == name.encode() == place.name.encode()
    assert find(body, list(range(len(body))), boundary) == place
    changed = body[: place.start] + b"new" + body[place.end :]
    assert find(changed, [], boundary) == Place("new", place.start, place.start + 3)


@pytest.mark.parametrize(
    "disposition",
    ['name="model"', "name=model", 'NAME="model"', 'name="model" '],
    ids=["quoted", "token", "case", "end"],
)
def test_ways_to_write_the_field(disposition: str) -> None:
    body = (
        b"preamble\r\n" + part('name="x"', b"") + part(disposition, b"m", "Content-Type: text/plain\r\n") + b"--b--\r\n"
    )
    for cuts in ([], list(range(len(body)))):
        place = find(body, cuts)
        assert place is not None
        assert place.name == "m"


@pytest.mark.parametrize("disposition", ['name="models"', 'name="model"; filename="model"', 'name="file"; x="model"'])
def test_what_is_not_the_field(disposition: str) -> None:
    assert find(part(disposition, b"m") + b"--b--") is None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (part('name="model"', b"a") + part('name="model"', b"a"), "ambiguous_model"),
        (part('name="model"', b"\xff"), "invalid_json"),
        (part('name="model"', b"a" * 3000), "model_not_found"),
        (part('name="model"', b"a" * 3000)[:-2], "model_not_found"),
        (b"--b\r\n" + b"x" * 9000, "invalid_json"),
    ],
)
def test_what_is_refused(body: bytes, code: str) -> None:
    for cuts in ([], list(range(len(body)))):
        with pytest.raises(GatewayError) as caught:
            find(body + b"--b--\r\n", cuts)
        assert caught.value.code == code


def test_nothing_after_the_last_delimiter_counts() -> None:
    assert find(b"--b--\r\n" + part('name="model"', b"m") + b"--b--") is None


def test_it_keeps_no_more_than_it_needs() -> None:
    finder = FormScanner(b"b" * 70)
    for endless in (b"-", b"\r\n", b"\r\n--" + b"b" * 69, b"x" * 100_000):
        for _ in range(100):
            finder.feed(endless)
            assert len(finder._rest) < 80
    assert finder.place is None
    assert MAX_NAME_BYTES < 10_000


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data; charset=utf-8; Boundary="a b"', b"a b"),
        (b"multipart/form-data;boundary=abc; x=y", b"abc"),
        (b"multipart/form-data", None),
        (b"application/json; boundary=abc", None),
        (b"", None),
    ],
)
def test_boundaries(content_type: bytes, boundary: bytes | None) -> None:
    assert boundary_of(content_type) == boundary
