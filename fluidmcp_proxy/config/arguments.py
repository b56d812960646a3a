"""What a server's command line says about where it listens and which names it serves.

Only the few options that concern the gateway are read; everything else is the server's business.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

VLLM_PORT = 8000
"""Where ``vllm serve`` listens without ``--port``."""

# Options of `vllm serve` and `transformers serve` without a value besides the --enable-*, --disable-* and --no-* ones:
# what follows them may be the model.
_FLAGS = {
    "--trust-remote-code", "--enforce-eager", "--headless", "--async-scheduling", "--skip-tokenizer-init",
    "--continuous-batching", "--compile", "--cb-use-cuda-graph",
}  # fmt: skip
_FLAG_PREFIXES = ("--enable-", "--disable-", "--no-", "--return-", "--log-", "--use-")


class _Engine(Enum):
    """Programs whose arguments name the model in a way of their own."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"
    OTHER = "other"


@dataclass(frozen=True)
class Option:
    """One option with its first value and the index of the argument where a fault in it is shown."""

    index: int
    value: str | None


@dataclass(frozen=True)
class ServerArguments:
    """The facts that ``command`` and ``args`` state."""

    is_vllm: bool
    port: Option | None
    host: Option | None
    uds: Option | None
    config_file: bool
    """``vllm serve --config FILE``: anything may be set there, so a missing option means nothing."""
    served_names: tuple[str, ...]
    """What requests call the model, as far as the arguments say."""

    @property
    def default_port(self) -> int | None:
        """The port without ``--port``, where it is known."""
        return VLLM_PORT if self.is_vllm and not self.config_file else None

    @property
    def takes_a_socket(self) -> bool:
        """Whether the server would listen on vLLM's default port, so that it may as well be told ``--uds``."""
        return self.default_port is not None and self.port is None and self.uds is None


def read_arguments(command: str, args: Sequence[str]) -> ServerArguments:
    """Read where the server listens and which names it serves, for vLLM and the engines of ``docs/engines.md``.

    As argparse does, the last of several wins and ``--port=1`` is ``--port 1``; as vLLM does, ``_`` is ``-`` in names.
    """
    engine, first = _engine(command, args)  # what stands before it is a launcher's: `uv run -- vllm serve m`
    is_vllm = engine is _Engine.VLLM
    return ServerArguments(
        is_vllm=is_vllm,
        port=find_option(args, "--port", first),
        host=find_option(args, "--host", first),
        uds=find_option(args, "--uds", first),
        config_file=is_vllm and find_option(args, "--config", first) is not None,
        served_names=_served_names(engine, args, first),
    )


def find_option(args: Sequence[str], name: str, first: int = 0) -> Option | None:
    """The last occurrence of ``name``, from the index ``first`` on."""
    found = None
    for index, written, value in options(args, first):
        if written == name:
            found = Option(index, value)
    return found


def options(args: Sequence[str], first: int = 0) -> Iterator[tuple[int, str, str | None]]:
    """Index, name and value of each long option; the value is the next argument unless that is an option itself."""
    for index, argument in enumerate(args[first:], first):
        if argument == "--":
            return
        if not argument.startswith("--"):
            continue
        name, separator, value = argument.partition("=")
        if separator:
            yield index, name.replace("_", "-"), value
            continue
        following = args[index + 1] if index + 1 < len(args) else None
        yield index, name.replace("_", "-"), None if following is None or following.startswith("--") else following


def misspelt_dash(argument: str) -> bool:
    """Whether an option begins with a typographic dash, as text editors and web pages make of ``--``."""
    return re.match(r"-?[\u2010-\u2015\u2212]+-?[A-Za-z]", argument) is not None


def glued_value(argument: str) -> bool:
    """Whether option and value are one argument, ``--port 8001``, which no shell has split here."""
    return re.match(r"--[A-Za-z][\w-]*\s+\S", argument) is not None


def _engine(command: str, args: Sequence[str]) -> tuple[_Engine, int]:
    """What is started, also behind a launcher, and the index in ``args`` from which on they are its own."""
    words = [command, *args]
    for index, (word, following) in enumerate(itertools.pairwise([*words, ""])):
        name = os.path.basename(word)
        is_value = index > 0 and words[index - 1].startswith("-")  # `docker run --name llama-server …`
        if name == "llama-server" and not is_value:
            return _Engine.LLAMA_CPP, index
        if name in ("vllm", "transformers") and following == "serve":
            return _Engine(name), index + 1
        if word == "-m" and (following == "vllm" or following.startswith("vllm.")):
            serve = index + 1 < len(args) and args[index + 1] == "serve"
            return _Engine.VLLM, index + 2 if serve else index + 1
    return _Engine.OTHER, 0


def _served_names(engine: _Engine, args: Sequence[str], first: int) -> tuple[str, ...]:
    if names := _values(args, "--served-model-name", first):
        return names
    model = find_option(args, "--model", first) or find_option(args, "--model-path", first)  # the latter is SGLang's
    written = model.value if model is not None else None
    if engine is _Engine.LLAMA_CPP:
        alias = find_option(args, "--alias", first)
        if alias is not None and alias.value:
            return tuple(name for part in alias.value.split(",") if (name := part.strip()))
        written = os.path.basename(written) if written else None
    elif engine is not _Engine.OTHER and model is None:
        written = _positional(args[first:])
    return (written,) if written else ()


def _positional(args: Sequence[str]) -> str | None:
    takes_value = False
    for argument in args:
        if not argument.startswith("-"):
            if not takes_value:
                return argument
            takes_value = False
            continue
        name = argument.replace("_", "-")
        takes_value = "=" not in argument and name not in _FLAGS and not name.startswith(_FLAG_PREFIXES)
    return None


def _values(args: Sequence[str], name: str, first: int) -> tuple[str, ...]:
    option = find_option(args, name, first)
    if option is None or option.value is None:
        return ()
    if "=" in args[option.index]:
        return (option.value,)
    values = []
    for value in args[option.index + 1 :]:
        if value.startswith("-"):
            break
        values.append(value)
    return tuple(values)
