"""From a file's path to the JSON document in it: the only input of the configuration room besides the environment.

It knows JSON, not what the document means.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
from typing import Any, NoReturn

from fluidmcp_proxy.errors import ConfigError

from .faults import json_path, kind, shown

MAX_BYTES = 1024 * 1024
"""The largest file that is read, in bytes (1 MiB)."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_WRITE_ONE = "write the path of a JSON file with an llmModels section"
_STRING_OR_CONSTANT = re.compile(r'"(?:\\.|[^"\\])*"|NaN|-?Infinity', re.DOTALL)


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys came twice."""

    repeated: str | None = None


def read_document(path: str) -> dict[str, Any]:
    """The JSON object in the file at ``path``.

    Raises ``ConfigError``: ``config_not_found``, ``config_not_file``, ``config_too_large``,
    ``config_invalid_encoding``, ``config_invalid_json``, ``config_duplicate_key``, ``config_invalid_type``.
    """
    return parse_document(read_file(path))


def read_file(path: str) -> bytes:
    """The bytes of a regular file of at most 1 MiB."""
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the path
        raise ConfigError("config_not_found", "no file can have this name", remedy=_WRITE_ONE) from error
    except OSError as error:
        raise _unreadable(error) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError("config_not_file", f"this is {what}", remedy=_WRITE_ONE)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(error) from error
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise ConfigError("config_too_large", "the file is larger than 1 MiB", remedy=_WRITE_ONE)
    return content


def parse_document(content: bytes) -> dict[str, Any]:
    """The JSON object in ``content``; UTF-8 with or without a byte order mark (RFC 8259 §8.1)."""
    text = _decode(content)
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=lambda name: _refuse_constant(text))
    except json.JSONDecodeError as error:
        where = f"{error.lineno}:{error.colno}"
        raise ConfigError("config_invalid_json", error.msg, path=where, remedy=_json_remedy(error)) from None
    except RecursionError:
        remedy = "write at most a few levels"
        raise ConfigError("config_invalid_json", "objects and lists are nested too deeply", remedy=remedy) from None
    except ValueError:  # Python's limit on the digits of a number
        remedy = "write a shorter number"
        raise ConfigError("config_invalid_json", "a number has too many digits", remedy=remedy) from None
    _refuse_repeated(document)
    if not isinstance(document, dict):
        problem = f"the top level must be an object, not {kind(document)}"
        raise ConfigError("config_invalid_type", problem, remedy='write {"llmModels": {…}}')
    return document


def _unreadable(error: OSError) -> ConfigError:
    if error.errno in _ABSENT:
        return ConfigError("config_not_found", "there is no such file", remedy=_WRITE_ONE)
    return ConfigError(
        "config_not_file", f"the file cannot be read ({os.strerror(error.errno or 0)})", remedy=_WRITE_ONE
    )


def _decode(content: bytes) -> str:
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace")
        where = _position(before, len(before))
        problem = f"byte {error.start} is not UTF-8"
        raise ConfigError("config_invalid_encoding", problem, path=where, remedy="save the file as UTF-8") from None


def _position(text: str, index: int) -> str:
    return f"{text.count(chr(10), 0, index) + 1}:{index - text.rfind(chr(10), 0, index)}"


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object()
    for key, value in pairs:
        if key in result and result.repeated is None:
            result.repeated = key
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    # json calls back without a position, so the first one outside a string is looked for.
    found = next(match for match in _STRING_OR_CONSTANT.finditer(text) if not match[0].startswith('"'))
    problem = f"{found[0]} is not JSON"
    where = _position(text, found.start())
    raise ConfigError("config_invalid_json", problem, path=where, remedy="write a finite number, or leave the key out")


def _json_remedy(error: json.JSONDecodeError) -> str:
    rest = error.doc[error.pos : error.pos + 2]
    before = error.doc[: error.pos].rstrip()
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments: remove it"
    if rest[:1] == "'":
        return "write strings in double quotes"
    if before.endswith(",") or (rest[:1] == "," and "trailing" in error.msg):
        return "remove the comma before the closing bracket"
    return "check the brackets, commas and quotes at this place"


def _refuse_repeated(document: object) -> None:
    pending: list[tuple[tuple[object, ...], object]] = [((), document)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, _Object):
            if value.repeated is not None:
                problem = f"{shown(value.repeated)} is written twice in one object"
                where = json_path(*path, value.repeated)
                raise ConfigError("config_duplicate_key", problem, path=where, remedy="keep one of them")
            pending.extend((((*path, key), item) for key, item in reversed(value.items())))
        elif isinstance(value, list):
            pending.extend((((*path, index), item) for index, item in reversed(list(enumerate(value)))))
