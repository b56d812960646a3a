"""How a fault in the configuration is worded: one line, a JSON path, a remedy and never a value that may be secret.

It does not decide what is a fault.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from fluidmcp_proxy.errors import ConfigError

OBJECT, LIST = "[object]", "[list]"
"""Tags of pydantic unions by shape; they are no part of a path."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_$-]+")
_MODEL_CODES = {
    "command": "invalid_command",
    "args": "invalid_args",
    "env": "invalid_env",
    "endpoints": "invalid_base_url",
}
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "a boolean"),
    ((int, float), "a number"),
    (str, "a string"),
    ((list, tuple), "a list"),
    (Mapping, "an object"),
)
_WANTED = {
    "string_type": "a string",
    "string_sub_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "path_type": "a string",
    "invalid_key": "an object whose keys are strings",
}
_PROBLEMS = {
    "string_too_short": "is empty",
    "too_short": "is empty",
    "missing": "is missing",
    "string_pattern_mismatch": "has characters that do not belong there",
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "finite_number": "must be a finite number",
}
_REMEDIES = {
    "string_type": "put it in double quotes",
    "string_sub_type": "put it in double quotes",
    "int_type": "write a JSON number without quotes",
    "float_type": "write a JSON number of seconds without quotes",
    "bool_type": "write true or false without quotes",
    "tuple_type": 'write a list: ["…"]',
    "dict_type": 'write an object: {"NAME": "value"}',
    "mapping_type": 'write an object: {"NAME": "value"}',
    "model_type": 'write an object: {"name": …}',
    "model_attributes_type": 'write an object: {"name": …}',
    "path_type": "put it in double quotes",
    "invalid_key": "put the name in double quotes",
    "int_from_float": "write it without a fraction",
    "int_parsing": "write digits only",
    "bool_parsing": "write true or false",
    "float_parsing": "write a number such as 30 or 0.5",
    "finite_number": "write an ordinary number",
    "greater_than": "write a larger number",
    "greater_than_equal": "write a larger number",
    "less_than_equal": "write a smaller number",
    "string_too_short": "write it, or leave the key out",
    "too_short": "write an entry, or leave the key out",
}
_REMEDIES_BY_KEY = {
    "readiness_path": "write an absolute path such as /health",
    "base_url": "write it like http://localhost:8001/v1",
    "host": "write a name or an address such as 127.0.0.1",
    "name": "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit",
}


def shown(text: object, limit: int = 80) -> str:
    """A name out of the file, quoted, on one line and short enough to print."""
    whole = str(text)
    cut = whole if len(whole) <= limit else whole[:limit] + "…"
    return "'" + printable(cut) + "'"


def printable(text: str) -> str:
    """``text`` on one line, with what a terminal might act on escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def json_path(*parts: object) -> str:
    """``llmModels.vllm.args[3]``; a key that is not a plain word goes into brackets."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(part, str) and _BARE_KEY.fullmatch(part):
            path += f".{part}" if path else part
        else:
            path += f"[{shown(part)}]"
    return path


def kind(value: object) -> str:
    """The JSON name of a value's type, for messages that must not show the value."""
    for types, name in _KINDS:
        if isinstance(value, types):
            return name
    return f"a Python {type(value).__name__}"


def nearest(name: object, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for an unknown name: the closest known one, else all of them, shown with ``prefix``."""
    candidates = list(known)
    by_shape = {_shape(candidate): candidate for candidate in candidates}
    close = difflib.get_close_matches(_shape(str(name)), by_shape, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{prefix}{by_shape[close[0]]}'?"
    return f"the known ones are {', '.join(prefix + candidate for candidate in candidates)}"


def unknown_key(name: object, known: Iterable[str], *parents: object) -> ConfigError:
    """An ``unknown_key`` for ``name`` inside ``parents``."""
    problem = f"{shown(name)} is not a key that can be used here"
    return ConfigError("unknown_key", problem, path=json_path(*parents, name), remedy=nearest(name, known))


def from_validation(
    error: ValidationError, *parents: object, known: Mapping[tuple[str, ...], Iterable[str]]
) -> ConfigError:
    """The first fault of pydantic's list in our words.

    ``known`` has the known keys of each object that may have unknown ones, by its place below ``parents`` without the
    numbers of list elements. The pydantic error itself is not chained by callers: it carries the values.
    """
    first, *others = error.errors(include_url=False)
    if first["type"] == "missing":  # perhaps only misspelt
        first = next((other for other in others if other["type"] == "extra_forbidden"), first)
    loc = tuple(part for part in first["loc"] if part not in ("[key]", OBJECT, LIST))
    if first["type"] == "extra_forbidden":
        names = known.get(tuple(part for part in loc[:-1] if isinstance(part, str)), ())
        return unknown_key(loc[-1], names, *parents, *loc[:-1])
    code = _MODEL_CODES.get(str(loc[0]) if loc else "", "invalid_value")
    return ConfigError(code, _problem(first), path=json_path(*parents, *loc), remedy=_remedy(first))


def refusal(problem: str, remedy: str) -> PydanticCustomError:
    """What a validator raises: becomes a ``ConfigError`` with this problem and remedy."""
    return PydanticCustomError("refusal", "{problem}", {"problem": problem, "remedy": remedy})


def _problem(first: Any) -> str:
    fault, given = first["type"], first["input"]
    if fault == "float_type" and kind(given) == "a number":  # a whole number of hundreds of digits
        return "must be a number of a sensible size"
    if fault in _WANTED:
        return f"must be {_WANTED[fault]}, not {'a fraction' if isinstance(given, float) else kind(given)}"
    if fault in ("enum", "literal_error"):
        return f"must be {first['ctx']['expected']}"
    return _PROBLEMS.get(fault) or str(first["msg"]).replace("Input should", "must")


def _remedy(first: Any) -> str:
    fault, key = first["type"], first["loc"][-1] if first["loc"] else ""
    if fault in ("enum", "literal_error"):
        return nearest(first["input"], re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    if "remedy" in first.get("ctx", {}):
        return str(first["ctx"]["remedy"])
    if fault in ("string_pattern_mismatch", "string_too_short", "missing") and key in _REMEDIES_BY_KEY:
        return _REMEDIES_BY_KEY[key]
    return _REMEDIES.get(fault, "")


def _shape(name: str) -> str:
    return name.lower().replace("-", "_").strip("_")
