"""The model's name in a JSON body: what ``json.loads`` sees there, wherever it is and however the body is cut."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.gateway.json_scanner import JsonScanner
from fluidmcp_proxy.gateway.model_name import MAX_NAME_BYTES, Place, encode, model_in


def find(body: bytes, cuts: list[int] | None = None) -> Place | None:
    """Find the name in ``body``, cut at these places; None: as a whole."""
    if cuts is None:
        return model_in(body)
    finder = JsonScanner()
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(places):
        finder.feed(body[start:end])
    finder.close()
    return finder.place


def refused(body: bytes, cuts: list[int] | None = None) -> str:
    with pytest.raises(GatewayError) as caught:
        find(body, cuts)
    json.dumps(caught.value.message).encode()
    caught.value.body()
    return caught.value.code


TEXT = st.text(max_size=8) | st.sampled_from(["model", '"', "\\", '\\"', "{[", "]}", "x" * 600, '"\\' * 60, ",:"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
MEMBERS = st.lists(st.tuples(TEXT.filter(lambda key: key != "model"), JSON), max_size=5)
CUTS = st.lists(st.integers(0, 5000), max_size=8)


@st.composite
def styles(draw: st.DrawFn) -> Any:
    """A way to write JSON: separators, escapes."""
    space = st.sampled_from(["", " ", "\n\t ", "\r\n"])
    separators = (draw(space) + "," + draw(space), draw(space) + ":" + draw(space))
    ascii_only = draw(st.booleans())
    return lambda value: json.dumps(value, separators=separators, ensure_ascii=ascii_only)


@given(styles(), MEMBERS, MEMBERS, st.text(max_size=20), CUTS, st.sampled_from(['"model"', r'"mod\u0065l"']), st.text())
@example(json.dumps, [], [], "", [], '"model"', "new")
def test_it_sees_what_json_sees_and_changes_nothing_else(
    write: Any, before: Any, after: Any, name: str, cuts: list[int], key: str, new: str
) -> None:
    colon, comma = (write({"": 0})[3:-2], write([0, 0])[2:-2])
    members = [f"{write(k)}{colon}{write(v)}" for k, v in before]
    members += [f"{key}{colon}{write(name)}", *(f"{write(k)}{colon}{write(v)}" for k, v in after)]
    body = ("{" + comma.join(members) + "}").encode("utf-8", "surrogatepass")
    place = find(body, cuts)
    assert place is not None
    assert place == find(body)
    assert place.name == name == json.loads(body)["model"]
    replaced = body[: place.start] + encode(new) + body[place.end :]
    assert json.loads(replaced) == {**json.loads(body), "model": new}
    assert json.loads(b'"' + body[place.start : place.end] + b'"') == name
    assert (body[place.start - 1 : place.start], body[place.end : place.end + 1]) == (b'"', b'"')


@given(MEMBERS, styles(), CUTS)
def test_without_a_model(members: Any, write: Any, cuts: list[int]) -> None:
    body = " " + write(dict(members)) + "\n"
    assert find(body.encode(), cuts) is find(body.encode()) is None


@given(st.binary(max_size=60) | st.text('{}[]":,\\ model0un', max_size=60).map(str.encode), CUTS)
@example(b'{"model":"a', [])
@example(rb'{"\ud800":1,"model":"a"}', [])
def test_any_bytes_any_cuts(body: bytes, cuts: list[int]) -> None:
    """The same result however it is cut, never another error; and what is an object to json is one here.

    As a whole it is read more strictly.
    """

    def outcome(cuts: list[int] | None) -> Any:
        try:
            return find(body, cuts)
        except GatewayError as error:
            return error.code

    whole = outcome([])
    assert outcome(cuts) == outcome(list(range(len(body)))) == whole
    strictly = outcome(None)
    assert strictly == whole or strictly == "invalid_json"
    try:
        pairs = json.loads(body.decode(), object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        return
    if isinstance(pairs, list) and body.strip().startswith(b"{"):
        assert strictly == whole
        named = [value for key, value in pairs if key == "model"]
        if not named or named == [None]:
            assert whole is None
        elif len(named) == 1 and isinstance(named[0], str) and "\\ud" not in body.decode().lower():
            assert whole.name == named[0]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"  ", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"a":1', "invalid_json"),
        (b'{"model":"a"', "invalid_json"),
        (b'{"model" "a"}', "invalid_json"),
        (b'{"a":1 "model":"a"}', "invalid_json"),
        (b'{"a":,"model":"a"}', "invalid_json"),
        (b"{'model':'a'}", "invalid_json"),
        (b'{model:"a"}', "invalid_json"),
        (b'\xff\xfe{\x00"\x00', "invalid_json"),
        ('{"model":"a"}'.encode("utf-16-le"), "invalid_json"),
        ('{"model":"a"}'.encode("utf-32-be"), "invalid_json"),
        (b'{"model":"\xff"}', "invalid_json"),
        (rb'{"model":"\ud800"}', "invalid_json"),
        (rb'{"model":"\x"}', "invalid_json"),
        (b"--boundary\r\n", "invalid_json"),
        (b'{"model":1}', "model_required"),
        (b'{"model":{"model":"a"}}', "model_required"),
        (b'{"model":["a"]}', "model_required"),
        (b'{"model":"a","model":"b"}', "ambiguous_model"),
        (b'{"model":"a","model":"a"}', "ambiguous_model"),
        (b'{"model":null,"model":"b"}', "ambiguous_model"),
        (rb'{"model":"a","b":[1],"\u006dodel":"b"}', "ambiguous_model"),
        (b'{"model":"' + b"a" * 3000 + b'"}', "model_not_found"),
    ],
)
def test_what_is_refused(body: bytes, code: str) -> None:
    assert refused(body) == code
    assert refused(body, []) == refused(body, list(range(len(body)))) == code


@pytest.mark.parametrize(
    "body",
    [b'{"model":"a"} x', b'{"model":"a"}{}', b'{"model":"a",}', b'{"a":x,"model":"a"}', b'{"a":[},"model":"a"}',
     b'{"a":"\xff","model":"a"}', b'{"model":"a","b":' + b"[" * 60_000],
)  # fmt: skip
def test_what_is_seen_only_as_a_whole(body: bytes) -> None:
    """In pieces these are left to the server, which reads them whole."""
    assert refused(body) == "invalid_json"


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model": null , "a":1}', b'{"a":{"model":"x"}}'])
def test_no_name(body: bytes) -> None:
    assert find(body) is find(body, []) is None
    assert find(body, list(range(len(body)))) is None


def test_the_longest_name() -> None:
    name = "a" * (MAX_NAME_BYTES - 2)
    body = b'{"model":"%b"}' % name.encode()
    for cuts in (None, [], list(range(MAX_NAME_BYTES))):
        assert find(body, cuts) == Place(name, 10, 10 + len(name))


def test_it_keeps_no_more_than_a_token() -> None:
    """Whatever comes and however it is cut: an endless key, a string, nesting, spaces."""
    for endless in (b'{"' + b"k" * 9000, b'{"a":"' + b"s" * 9000, b'{"a":' + b"[" * 9000, b"{" + b" " * 9000,
                    b'{"a":"' + b"\\" * 9001, b'{"a":"' + b'\\"' * 4500, b'{"a":' + b"9" * 9000):  # fmt: skip
        for size in (1, 7, 4096):
            finder = JsonScanner()
            for start in range(0, len(endless), size):
                finder.feed(endless[start : start + size])
                assert len(finder._rest) <= 64


@pytest.mark.parametrize(
    "filling",
    [b'"' + b"A" * 65536, b'\\"' * 32768, b"\\\\" * 32768, b"[" * 65536, b"[]," * 21845, b'{"a":[{"b":"c"}]},' * 3640,
     b'"' + b"[" * 65535, b'{"a":' * 13107, b'"",' * 21845],
    ids=["image", "quotes", "backslashes", "open", "pairs", "messages", "string", "deep", "strings"],
)  # fmt: skip
def test_the_time_grows_with_the_length_only(filling: bytes) -> None:
    """Sixteen times the body takes sixteen times the time, not 256 times.

    What a busy machine adds is added to some of many measurements, so the shortest of each counts.
    """

    def seconds(count: int) -> float:
        finder, body = JsonScanner(), filling * count
        finder.feed(b'{"messages":[' if not filling.startswith(b"\\") else b'{"messages":["')
        begin = time.thread_time()
        finder.feed(body)
        return time.thread_time() - begin

    short, long = [seconds(2)], [seconds(32)]
    while min(long) > 64 * max(min(short), 1e-5):
        short.append(seconds(2))
        long.append(seconds(32))
        assert len(long) < 30, f"{min(short):.6f} s, and {min(long):.6f} s for 16 times as much"


@given(st.text(st.characters(codec="utf-8")))
def test_the_names_bytes(name: str) -> None:
    assert json.loads(b'"' + encode(name) + b'"') == name
