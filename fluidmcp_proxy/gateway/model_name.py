"""The model's name in a JSON body that is here as a whole, and what is shared by those who look for it in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from fluidmcp_proxy.errors import AmbiguousModel, InvalidJSON, ModelNotFound, ModelRequired

__all__ = ["MAX_NAME_BYTES", "Place", "encode", "invalid", "model_in", "no_string", "too_long", "twice"]

MAX_NAME_BYTES = 2048
"""The longest value that can be a model's name, as written."""

# json's own parser of one value, in C: value and end from a text and a place in it.
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(strict=False).scan_once  # type: ignore[attr-defined]

_SPACE = r"[ \t\n\r]*+"
_KEY = rf'"((?:[^"\\]++|\\.)*+)"{_SPACE}:{_SPACE}'
_END = rf"\}}{_SPACE}\Z"
# Up to the first or the next value, with its key; or the end of the object, which has to be the end of all.
_FIRST = re.compile(rf"{_SPACE}\{{{_SPACE}(?:{_KEY}|{_END})", re.DOTALL).match
_NEXT = re.compile(rf"{_SPACE}(?:,{_SPACE}{_KEY}|{_END})", re.DOTALL).match


class Place(NamedTuple):
    """The model's name and the bytes of the body, from ``start`` to ``end``, in which it stands, without quotes."""

    name: str
    start: int
    end: int


def model_in(body: bytes) -> Place | None:
    """The value of the top-level key ``model``; None if it is absent or null.

    Raises:
        InvalidJSON: the body is not one JSON object in UTF-8.
        ModelRequired: ``model`` is neither a string nor null.
        ModelNotFound: the name is over ``MAX_NAME_BYTES``.
        AmbiguousModel: ``model`` comes twice; readers differ in which one they take.
    """
    try:
        text = body.decode()
        found = _models(text)
        if len(found) > 1:
            raise twice()
        if not found or (value := found[0][0]) is None:
            return None
        if not isinstance(value, str):
            raise no_string()
        value.encode()  # half a surrogate pair is no character
    except RecursionError:
        raise invalid("it is nested too deeply") from None
    except (ValueError, StopIteration):  # the latter is how json says that there is no value
        raise invalid("it is not JSON in UTF-8") from None
    _, start, end = found[0]
    if not text.isascii():
        start, end = len(text[:start].encode()), len(text[:end].encode())
    if end - start > MAX_NAME_BYTES:
        raise too_long()
    return Place(value, start + 1, end - 1)


def _models(text: str) -> list[tuple[Any, int, int]]:
    """Value and place of each member ``model`` of the one object in ``text``; ValueError, StopIteration otherwise."""
    found: list[tuple[Any, int, int]] = []
    match = _FIRST(text)
    while match is not None:
        key = match[1]
        if key is None:
            return found
        start = match.end()
        value, at = _scan(text, start)
        if key == "model" or ("\\" in key and json.loads(f'"{key}"', strict=False) == "model"):
            found.append((value, start, at))
        match = _NEXT(text, at)
    raise ValueError


@lru_cache(maxsize=256)
def encode(name: str) -> bytes:
    """``name`` as it stands between quotes."""
    return json.dumps(name)[1:-1].encode()


def twice() -> AmbiguousModel:
    """A body that names two models."""
    return AmbiguousModel("The request body has `model` twice.", param="model")


def no_string() -> ModelRequired:
    """A ``model`` that is no name."""
    return ModelRequired("`model` must be a string.", param="model")


def too_long() -> ModelNotFound:
    """A name over ``MAX_NAME_BYTES``."""
    return ModelNotFound("There is no LLM model with such a long name.", param="model")


def invalid(why: str) -> InvalidJSON:
    """A body that is no JSON object."""
    return InvalidJSON(f"The request body has to be a JSON object: {why}.")
