"""Which strings of a model are secrets: told by the names of variables and options, and by the look of known keys.

It only collects them; redacting the output is done where the output is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .arguments import options

SHORTEST = 8
"""A shorter string is a secret only if its name says so: redacting it would garble the output."""
SHORTEST_NAMED = 4
"""A string this short is not redacted whatever its name says."""

_SECRET_WORD = re.compile(r"(TOKEN|KEYS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
_SECRET_OPTIONS = {"--api-key", "--hf-token", "--token", "--password"}
_KNOWN_KEY = re.compile(
    r"(?<![\w/.-])(?:hf_(?!transfer|xet|hub)[A-Za-z0-9]{6,}|sk-[A-Za-z0-9_-]{6,}|nvapi-[A-Za-z0-9_-]{6,})"
)
_PLACE = re.compile(r"(^|_)(HOME|PATH|PWD|OLDPWD|USER|LOGNAME|LANG|SHELL|TERM|HOST|HOSTNAME|TMPDIR|DIR|ROOT|FILE)$")
_PLAIN_VALUES = {"true", "false", "none", "null", "auto", "default", "empty", "dummy"}


def is_secret_name(name: str) -> bool:
    """Whether a variable's name says that its value is secret: HF_TOKEN does, TOKENIZERS_PARALLELISM does not."""
    return any(_SECRET_WORD.search(word) for word in name.split("_"))


def secret_arguments(args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Index and text of each secret in a command line."""
    for index, name, value in options(args):
        if name in _SECRET_OPTIONS and value:
            yield index, value
    for index, argument in enumerate(args):
        for match in _KNOWN_KEY.finditer(argument):
            yield index, match[0]


def secrets_of_environment(environ: Mapping[str, str]) -> Iterator[str]:
    """The values of variables whose names say that they are secret."""
    for name, value in environ.items():
        if is_secret_name(name) and worth_redacting(value):
            yield value


def worth_redacting(value: str) -> bool:
    """Whether a value whose name says that it is secret can be one, rather than a number, a switch or a placeholder."""
    return len(value) >= SHORTEST_NAMED and not value.isdigit() and value.lower() not in _PLAIN_VALUES


def mask_arguments(args: Sequence[str], secrets: Iterable[str]) -> tuple[str, ...]:
    """A command line that can be shown."""
    hidden = sorted({*secrets, *(text for _, text in secret_arguments(args))}, key=len, reverse=True)
    return tuple(functools.reduce(lambda text, secret: text.replace(secret, "***"), hidden, word) for word in args)


def secrets_of_expansion(value: str, names: Iterable[str], environ: Mapping[str, str]) -> Iterator[str]:
    """The values that ``${NAME}`` brought in, and what they became; names of places and people are not secret."""
    hidden = [name for name in names if not _PLACE.search(name)]
    for text in [*(environ[name] for name in hidden), *([value] if hidden else [])]:
        if len(text) >= SHORTEST:
            yield text
