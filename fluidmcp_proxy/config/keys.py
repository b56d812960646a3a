"""Keys of the gateway: of each only its SHA-256 digest is kept.

What a key opens is decided where requests come in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .expansion import expand
from .faults import json_path, refusal

FIELDS = ("name", "key", "sha256", "models")
"""The keys of an entry."""
SHORTEST = 16
"""Characters that a key must have. An unsalted digest keeps a secret only that nobody can guess: 16 random hexadecimal
digits are 64 bits, while the short words that people make up are found from their digest in no time."""

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_SENDABLE = re.compile(r"[!-~]+")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_MAKE_ONE = "make one with: openssl rand -hex 32"


def _digested(value: object) -> object:
    """An entry as written, with its key replaced by the digest."""
    if isinstance(value, str):
        return {"sha256": _digest(value)}
    if not isinstance(value, Mapping):
        return value
    if any(isinstance(name, str) and len(name) >= SHORTEST for name in value):  # not shown: it may be the key itself
        raise refusal("is an object with an unknown name in it", f"the known ones are {', '.join(FIELDS)}")
    if ("key" in value) == ("sha256" in value):
        raise refusal("needs either key or sha256", 'write {"name": "alice", "key": "${ALICE_KEY}"}')
    if "key" not in value:
        return value
    if not isinstance(value["key"], str):
        raise refusal("its key must be a string", "put it in double quotes")
    return {**{name: part for name, part in value.items() if name != "key"}, "sha256": _digest(value["key"])}


def _digest(key: str) -> str:
    if len(key) < SHORTEST:
        raise refusal(f"the key is shorter than {SHORTEST} characters and could be guessed", _MAKE_ONE)
    if not _SENDABLE.fullmatch(key):
        raise refusal("the key has spaces or other characters that no header can carry as they are", _MAKE_ONE)
    return hashlib.sha256(key.encode()).hexdigest()


def _hexadecimal(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise refusal("is not a SHA-256 digest of 64 hexadecimal digits", "write what sha256sum says of the key alone")
    return digest.lower()


def _as_written(schema: dict[str, Any]) -> None:
    """Make the schema of a key that of its entry in the file."""
    entry = {name: part for name, part in schema.items() if name != "required"}
    key = {"type": "string", "minLength": 1, "description": "The key itself; may be ${NAME}."}
    entry["properties"] = {**entry["properties"], "key": key}
    entry["oneOf"] = [{"required": ["key"]}, {"required": ["sha256"]}]
    schema.clear()
    schema["anyOf"] = [{**key, "description": "A key without a name; may be ${NAME}."}, entry]


class Key(BaseModel):
    """A key: a string, or an object with ``key`` or ``sha256``; the string itself is not kept."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, json_schema_extra=_as_written
    )

    name: Annotated[str, Field(pattern=_NAME)] = Field("", description="What the log calls its holder.")
    sha256: Annotated[str, AfterValidator(_hexadecimal)] = Field(
        repr=False, description="SHA-256 of the key, in hex.", json_schema_extra={"pattern": f"^{_DIGEST.pattern}$"}
    )
    models: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="Ids of the models that it opens; all of them where not said."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_the_key(cls, value: object) -> object:
        return _digested(value)


def named(keys: Sequence[Key], prefix: str) -> tuple[Key, ...]:
    """``keys`` with a name for each that has none: ``key-1`` for the first in the list."""
    return tuple(
        key if key.name else key.model_copy(update={"name": f"{prefix}-{place}"})
        for place, key in enumerate(keys, start=1)
    )


def all_opening(keys: Sequence[Key]) -> Sequence[Key]:
    """``keys``, none of which may be limited."""
    for key in keys:
        if key.models is not None:
            raise refusal("an admin key opens every model", "remove its models, or move it to api_keys")
    return keys


def expanded(entries: object, environ: Mapping[str, str], *parents: object) -> object:
    """A list of the file with ``${NAME}`` replaced in its keys; whatever is no such list stays for the validation."""
    if not isinstance(entries, list | tuple):
        return entries
    return [_expanded(entry, environ, *parents, place) for place, entry in enumerate(entries)]


def _expanded(entry: object, environ: Mapping[str, str], *where: object) -> object:
    if isinstance(entry, str):
        return expand(entry, environ, path=json_path(*where), code="invalid_value")[0]
    if isinstance(entry, Mapping) and isinstance(entry.get("key"), str):
        path = json_path(*where, "key")
        return {**entry, "key": expand(entry["key"], environ, path=path, code="invalid_value")[0]}
    return entry
