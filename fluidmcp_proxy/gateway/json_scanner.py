"""Where a JSON object that comes in pieces has the value of its top-level key ``model``.

Nothing is decoded but that key and that value, and the inside of long strings is not even looked at: a closing quote is
found at the speed of ``bytes.find``. What it passes over need not be JSON in every detail; the model's server reads it
whole and says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from fluidmcp_proxy.gateway.model_name import MAX_NAME_BYTES, Place, invalid, no_string, too_long, twice

__all__ = ["JsonScanner"]

_LONGEST_KEY = 40
"""Bytes of ``"model"`` with every letter escaped, quotes included, and some."""

_SPACE = re.compile(rb"[ \t\n\r]*").match
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL).match
_SCALAR = re.compile(rb"[^\s\",:\[\]{}]*").match


def _run() -> bytes:
    """A pattern for what is inside brackets, up to one whose end is not here or too deep, or to a long string.

    No group is ever tried twice (possessive quantifiers), so the time is linear. A long string is not matched, since
    ``bytes.find`` is ten times as fast as a pattern.
    """
    # The first quote ends a string unless a backslash is before it; one excluded byte is much faster than two.
    string = rb'"(?:[^"]{0,1000}+(?<!\\)"|[^"\\]{0,500}+(?:\\.[^"\\]{0,500}+){0,50}+")'
    run = rb'(?:[^"\[\]{}]++|%b)*+' % string
    for _ in range(4):
        run = rb'(?:[^"\[\]{}]++|%b|[\[{]%b[\]}])*+' % (string, run)
    return run


_RUN = re.compile(_run(), re.DOTALL).match
_ESCAPES = re.compile(rb'(?:[^"\\]{0,64}+\\.)*+', re.DOTALL).match

_Step = Callable[["JsonScanner", bytes, int], int]


class JsonScanner:
    """Fed with the pieces of a body, it finds the model's name; ``place`` is None until then.

    ``feed`` and ``close`` raise what ``model_in`` raises, but are less strict about what they pass over.
    """

    __slots__ = ("_depth", "_offset", "_rest", "_seen", "_step", "_then", "place")

    def __init__(self) -> None:
        self.place: Place | None = None
        self._offset = 0  # in the body, of the bytes that the next step sees
        self._rest = b""  # of the last piece: an unfinished token, always short
        self._step: _Step = JsonScanner._open
        self._then: _Step = JsonScanner._open  # the step after a string
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
        if self._step is not JsonScanner._done:
            raise invalid("it ends too early")

    # Steps: each takes the bytes from ``at`` on, sets the next step and returns where that begins. One that returns
    # ``at`` and leaves the step as it is has seen the beginning of something.

    def _open(self, data: bytes, at: int) -> int:
        return self._expect(b"{", data, at, then=JsonScanner._key)

    def _key(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] != _QUOTE:
            return self._expect(b"}", data, start, then=JsonScanner._done)
        if match := _STRING(data, start):
            self._step = JsonScanner._colon
            if _is_model(match[1]):
                self._note_model()
            return match.end()
        if len(data) - start > _LONGEST_KEY:
            return self._pass_string(start, then=JsonScanner._colon)
        return start

    def _note_model(self) -> None:
        if self._seen:
            raise twice()
        self._seen = True
        self._step = JsonScanner._model_colon

    def _colon(self, data: bytes, at: int) -> int:
        return self._expect(b":", data, at, then=JsonScanner._value)

    def _model_colon(self, data: bytes, at: int) -> int:
        return self._expect(b":", data, at, then=JsonScanner._model)

    def _model(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] != _QUOTE:
            if data[start] != ord("n"):
                raise no_string()
            self._step = JsonScanner._value
            return start
        match = _STRING(data, start)
        if (match.end() if match else len(data)) - start > MAX_NAME_BYTES:
            raise too_long()
        if match is None:
            return start
        self.place = Place(_decoded(match[1]), self._offset + match.start(1), self._offset + match.end(1))
        self._step = JsonScanner._after
        return match.end()

    def _value(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] == _QUOTE:
            return self._pass_string(start, then=JsonScanner._after)
        if data[start] in _OPENING:
            self._depth = 1
            self._step = JsonScanner._nested
            return start + 1
        self._step = JsonScanner._scalar
        if _SCALAR(data, start).end() == start:  # type: ignore[union-attr]
            raise invalid("a value is missing")
        return start

    def _scalar(self, data: bytes, at: int) -> int:
        end: int = _SCALAR(data, at).end()  # type: ignore[union-attr]
        if end < len(data):
            self._step = JsonScanner._after
        return end

    def _after(self, data: bytes, at: int) -> int:
        start = _space(data, at)
        if data[start : start + 1] == b"}":
            self._step = JsonScanner._done
            return start + 1
        return self._expect(b",", data, start, then=JsonScanner._key)

    def _nested(self, data: bytes, at: int) -> int:
        while at < len(data):
            at = _RUN(data, at).end()  # type: ignore[union-attr]
            if at == len(data):
                break
            if data[at] == _QUOTE:
                return self._pass_string(at, then=JsonScanner._nested)
            self._depth += 1 if data[at] in _OPENING else -1
            at += 1
            if not self._depth:
                self._step = JsonScanner._after
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
        self._step, self._then = JsonScanner._string, then
        return quote + 1

    def _expect(self, mark: bytes, data: bytes, at: int, *, then: _Step) -> int:
        start = _space(data, at)
        if start == len(data):
            return start
        if data[start] != mark[0]:
            raise invalid(f"{mark.decode()} expected")
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
        raise invalid("the value of `model` is no text in UTF-8") from None
    return text
