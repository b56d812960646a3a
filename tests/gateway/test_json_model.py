"""The model's name in a JSON body: what ``json.loads`` sees there, wherever it is and however the body is cut."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.gateway.json_model import MAX_NAME_BYTES, JsonModel


def find(body: bytes, cuts: list[int] | None = None) -> JsonModel:
    """Feed ``body``, cut at these places, to a finder."""
    finder = JsonModel()
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts or []), len(body)]
    for start, end in itertools.pairwise(places):
        finder.feed(body[start:end])
    finder.close()
    return finder


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
    finder = find(body, cuts)
    assert finder.name == name == json.loads(body)["model"]
    replaced = body[: finder.start] + JsonModel.encode(new) + body[finder.end :]
    assert json.loads(replaced) == {**json.loads(body), "model": new}
    assert json.loads(b'"' + body[finder.start : finder.end] + b'"') == name
    assert (body[finder.start - 1 : finder.start], body[finder.end : finder.end + 1]) == (b'"', b'"')


@given(MEMBERS, styles(), CUTS)
def test_without_a_model(members: Any, write: Any, cuts: list[int]) -> None:
    body = " " + write(dict(members)) + "\n"
    assert find(body.encode(), cuts).name is None


@given(st.binary(max_size=60) | st.text('{}[]":,\\ model0un', max_size=60).map(str.encode), CUTS)
@example(b'{"model":"a', [])
@example(rb'{"\ud800":1,"model":"a"}', [])
def test_any_bytes_any_cuts(body: bytes, cuts: list[int]) -> None:
    """The same result however it is cut, never another error; and what is an object to json is one here."""

    def outcome(cuts: list[int]) -> Any:
        try:
            finder = find(body, cuts)
            return finder.name, finder.start, finder.end
        except GatewayError as error:
            return error.code

    whole = outcome([])
    assert outcome(cuts) == outcome(list(range(len(body)))) == whole
    try:
        pairs = json.loads(body.decode(), object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        return
    if isinstance(pairs, list) and body.strip().startswith(b"{"):
        named = [value for key, value in pairs if key == "model"]
        if not named or named == [None]:
            assert whole == (None, 0, 0)
        elif len(named) == 1 and isinstance(named[0], str) and "\\ud" not in body.decode().lower():
            assert whole[0] == named[0]


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
    assert refused(body, list(range(len(body)))) == code


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model": null , "a":1}', b'{"a":{"model":"x"}}'])
def test_no_name(body: bytes) -> None:
    assert find(body).name is None
    assert find(body, list(range(len(body)))).name is None


def test_the_longest_name() -> None:
    name = "a" * (MAX_NAME_BYTES - 2)
    assert find(b'{"model":"%b"}' % name.encode()).name == name
    assert find(b'{"model":"%b"}' % name.encode(), list(range(MAX_NAME_BYTES))).name == name


def test_it_keeps_no_more_than_a_token() -> None:
    """Whatever comes and however it is cut: an endless key, a string, nesting, spaces."""
    for endless in (b'{"' + b"k" * 9000, b'{"a":"' + b"s" * 9000, b'{"a":' + b"[" * 9000, b"{" + b" " * 9000,
                    b'{"a":"' + b"\\" * 9001, b'{"a":"' + b'\\"' * 4500, b'{"a":' + b"9" * 9000):  # fmt: skip
        for size in (1, 7, 4096):
            finder = JsonModel()
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
    """Twice the body takes about twice the time: a ratio, with much room for a busy machine."""

    def seconds(count: int) -> float:
        best = 9.0
        for _ in range(3):
            finder = JsonModel()
            finder.feed(b'{"messages":[' if not filling.startswith(b"\\") else b'{"messages":["')
            begin = time.thread_time()
            finder.feed(filling * count)
            best = min(best, time.thread_time() - begin)
        return best

    assert seconds(8) < 8 * 4 * max(seconds(2) / 2, 2e-5)


def test_the_names_bytes() -> None:
    assert JsonModel.encode('a"b\\c/ä') == 'a\\"b\\\\c/ä'.encode()
    assert not re.search(rb'(?<!\\)"', JsonModel.encode('"'))
