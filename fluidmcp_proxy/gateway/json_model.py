"""Where a JSON object that comes in pieces has the value of its top-level key ``model``.

Nothing is decoded but that key and that value, and the inside of long strings is not even looked at: a closing quote is
found at the speed of ``bytes.find``. What it passes over need not be JSON in every detail; the model's server reads it
whole and says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from fluidmcp_proxy.errors import AmbiguousModel, InvalidJSON, ModelNotFound, ModelRequired

__all__ = ["MAX_NAME_BYTES", "JsonModel"]

MAX_NAME_BYTES = 2048
"""The longest value that can be a model's name, as written."""

_LONGEST_KEY = 40
"""Bytes of ``"model"`` with every letter escaped, quotes included, and some."""

_SPACE = re.compile(rb"[ \t\n\r]*").match
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL).match
_SCALAR = re.compile(rb"[^\s\",:\[\]{}]*").match


def _whole_values() -> tuple[bytes, bytes]:
    """Patterns that take in one match what is all here, short and not too deep: a run inside brackets, and a member.

    What they do not match goes the slow way, step by step. No group is ever tried twice (possessive quantifiers), so
    the time is linear. A long string is not matched, since ``bytes.find`` is ten times as fast as a pattern.
    """
    string = rb'"[^"\\]{0,500}+(?:\\.[^"\\]{0,500}+){0,50}+"'
    run = rb'(?:[^"\[\]{}]++|%b)*+' % string
    for _ in range(4):
        nested = rb"[\[{]%b[\]}]" % run
        run = rb'(?:[^"\[\]{}]++|%b|%b)*+' % (string, nested)
    value = rb'(?:%b|%b|[^\s",:\[\]{}]++)' % (string, nested)
    space = rb"[ \t\n\r]*+"
    key = rb'"(?!model")[^"\\]{0,64}+"'
    return run, rb"(?:%b%b%b:%b%b%b(?:,|(?=\})))*+" % (space, key, space, space, value, space)


_RUN, _OTHER_MEMBERS = (re.compile(pattern, re.DOTALL).match for pattern in _whole_values())
_ESCAPES = re.compile(rb'(?:[^"\\]{0,64}+\\.)*+', re.DOTALL).match

_Step = Callable[["JsonModel", bytes, int], int]


class JsonModel:
    """Fed with the pieces of a body, it finds the model's name.

    ``name`` is None until it is found, ``start`` and ``end`` enclose the string, without its quotes, in the whole body.
    ``feed`` and ``close`` raise:

        InvalidJSON: the body is not one JSON object in UTF-8.
        ModelRequired: ``model`` is neither a string nor null, which counts as absent.
        ModelNotFound: the name is over ``MAX_NAME_BYTES``.
        AmbiguousModel: ``model`` comes twice; readers differ in which one they take.
    """

    __slots__ = ("_depth", "_offset", "_rest", "_seen", "_step", "_then", "end", "name", "start")

    def __init__(self) -> None:
        self.name: str | None = None
        self.start = self.end = 0
        self._offset = 0  # in the body, of the bytes that the next step sees
        self._rest = b""  # of the last piece: an unfinished token, always short
        self._step: _Step = JsonModel._open
        self._then: _Step = JsonModel._open  # the step after a string
        self._depth = 0
        self._seen = False

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        data = self._rest + piece if self._rest else piece
        at = 0
        while at < len(data):
            step = self._step
            now = step(self, data, at)
            if now == at and step is self._step:
                break  # it needs more
            at = now
        self._rest = data[at:]
        self._offset += at

    def close(self) -> None:
        """Take note of the end of the body."""
        if self._step is not JsonModel._done:
            raise _invalid("it ends too early")

    @staticmethod
    def encode(name: str) -> bytes:
        """``name`` as it stands between the quotes."""
        return json.dumps(name, ensure_ascii=False)[1:-1].encode()

    # Steps: each takes the bytes from ``at`` on, sets the next step and returns where that begins. One that returns
    # ``at`` and leaves the step as it is has seen the beginning of something.

    def _open(self, data: bytes, at: int) -> int:
        return self._expect(b"{", data, at, then=JsonModel._key)

    def _key(self, data: bytes, at: int) -> int:
        start = _space(data, _OTHER_MEMBERS(data, at).end())  # type: ignore[union-attr]
        if start == len(data):
            return start
        if data[start] != _QUOTE:
            return self._expect(b"}", data, start, then=JsonModel._done)
        if match := _STRING(data, start):
            self._step = JsonModel._colon
            if _is_model(match[1]):
                self._note_model()
            return match.end()
        if len(data) - start > _LONGEST_KEY:
            return self._pass_string(start, then=JsonModel._colon)
        return start

    def _note_model(self) -> None:
        if self._seen:
            raise AmbiguousModel("The request body has `model` twice.", param="model")
        self._seen = True
        self._step = JsonModel._model_colon

    def _colon(self, data: bytes, at: int) -> int:
        return self._expect(b":", data, at, then=JsonModel._value)

    def _model_colon(self, data: bytes, at: int) -> int:
        return self._expect(b":", data, at, then=JsonModel._model)

    def _model(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] != _QUOTE:
            if data[start] != ord("n"):
                raise ModelRequired("`model` must be a string.", param="model")
            self._step = JsonModel._value
            return start
        match = _STRING(data, start)
        if (match.end() if match else len(data)) - start > MAX_NAME_BYTES:
            raise ModelNotFound("There is no LLM model with such a long name.", param="model")
        if match is None:
            return start
        self.name = _decoded(match[1])
        self.start, self.end = self._offset + match.start(1), self._offset + match.end(1)
        self._step = JsonModel._after
        return match.end()

    def _value(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] == _QUOTE:
            return self._pass_string(start, then=JsonModel._after)
        if data[start] in _OPENING:
            self._depth = 1
            self._step = JsonModel._nested
            return start + 1
        self._step = JsonModel._scalar
        if _SCALAR(data, start).end() == start:  # type: ignore[union-attr]
            raise _invalid("a value is missing")
        return start

    def _scalar(self, data: bytes, at: int) -> int:
        end: int = _SCALAR(data, at).end()  # type: ignore[union-attr]
        if end < len(data):
            self._step = JsonModel._after
        return end

    def _after(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if data[start : start + 1] == b"}":
            self._step = JsonModel._done
            return start + 1
        return self._expect(b",", data, start, then=JsonModel._key)

    def _nested(self, data: bytes, at: int) -> int:
        while at < len(data):
            at = _RUN(data, at).end()  # type: ignore[union-attr]
            if at == len(data):
                break
            if data[at] == _QUOTE:
                return self._pass_string(at, then=JsonModel._nested)
            self._depth += 1 if data[at] in _OPENING else -1
            at += 1
            if not self._depth:
                self._step = JsonModel._after
                break
        return at

    def _string(self, data: bytes, at: int) -> int:
        while True:
            at = _ESCAPES(data, at).end()  # type: ignore[union-attr]
            quote = data.find(b'"', at)
            if quote < 0:
                # A backslash at the end goes with what the next piece brings.
                return len(data) - _backslashes(data, at, len(data)) % 2
            if _backslashes(data, at, quote) % 2 == 0:
                self._step = self._then
                return quote + 1
            at = quote + 1

    def _done(self, data: bytes, at: int) -> int:
        return len(data)

    def _pass_string(self, quote: int, *, then: _Step) -> int:
        self._step, self._then = JsonModel._string, then
        return quote + 1

    def _expect(self, mark: bytes, data: bytes, at: int, *, then: _Step) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] != mark[0]:
            raise _invalid(f"{mark.decode()} expected")
        self._step = then
        return start + 1


_QUOTE = ord('"')
_OPENING = b"[{"


def _space(data: bytes, at: int) -> int:
    return _SPACE(data, at).end()  # type: ignore[union-attr]


def _backslashes(data: bytes, start: int, end: int) -> int:
    """How many there are right before ``end``."""
    at = end
    while at > start and data[at - 1] == 0x5C:
        at -= 1
    return end - at


def _is_model(key: bytes) -> bool:
    if b"\\" not in key or len(key) > _LONGEST_KEY:
        return key == b"model"
    try:
        return bool(json.loads(b'"%b"' % key) == "model")
    except ValueError:
        return False  # the server will say so


def _decoded(raw: bytes) -> str:
    try:
        text = raw.decode()
        if "\\" in text:
            text = json.loads(f'"{text}"')
            text.encode()  # half a surrogate pair is no character
    except ValueError:
        raise _invalid("the value of `model` is no text in UTF-8") from None
    return text


def _invalid(why: str) -> InvalidJSON:
    return InvalidJSON(f"The request body has to be a JSON object: {why}.")
