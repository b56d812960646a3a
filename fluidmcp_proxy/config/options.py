"""What the user may write of a model, as values: the keys of one entry of ``llmModels``.

Each key is looked at by itself; ``entry`` makes the model of them. The field descriptions are the source of the JSON
Schema and are checked against ``docs/configuration.md``.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from .faults import LIST, OBJECT, refusal

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RESERVED_IDS = ("v1", "health", "ready", "metrics", "models", "static", "docs")
_SERVER_PATH = r"^/[!-~]*$"
# What can be written in a path, too, for GET /v1/models/NAME: organisations, tags and revisions included.
_ALIAS = re.compile(r"(?=.{1,256}\Z)[A-Za-z0-9][A-Za-z0-9._:@+-]*(?:/[A-Za-z0-9][A-Za-z0-9._:@+-]*)*")
_AFFINITY = re.compile(r"^(prefix|header:[A-Za-z0-9-]{1,64})$")
_EXTRA_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()+,;=:@-]*)+\*?")


class RestartPolicy(StrEnum):
    """What follows an exit that nobody asked for."""

    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class Start(StrEnum):
    """When a model's server is started."""

    EAGER = "eager"
    ON_DEMAND = "on_demand"


def _passable(text: str) -> str:
    if "\0" in text:
        raise refusal("has a NUL character, which no program can be given", "remove it")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise refusal("has a lone surrogate, which is no character", "remove it")
    return text


def _program(command: str) -> str:
    if not command.strip() or command != command.strip():
        raise refusal("is empty, or begins or ends with a space", "write the program's name or path alone")
    if any(char.isspace() for char in command) and "/" not in command:
        raise refusal("has arguments in it, and there is no shell to split them", "put the arguments into args")
    if command.startswith("~"):
        raise refusal("begins with ~, which only a shell expands", "write the whole path")
    return command


def _extra_path(path: str) -> str:
    segments = path.removesuffix("*").split("/")
    if not _EXTRA_PATH.fullmatch(path) or "//" in path or "." in segments or ".." in segments:
        raise refusal(
            "is not an absolute path (no query, no escapes, no dot segments, * only at its end)",
            "write it like '/tokenize' or '/admin/*'",
        )
    return path


def _group(name: str) -> str:
    if not MODEL_ID.fullmatch(name):
        raise refusal("cannot be a group's name", "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
    return name


def _alias(name: str) -> str:
    if not _ALIAS.fullmatch(name):
        raise refusal("cannot be a model's name", "use 1 to 256 of A-Z a-z 0-9 . _ : @ + - in parts divided by /")
    return name


def _affinity(text: str) -> str:
    if not _AFFINITY.fullmatch(text):
        raise refusal("is no affinity", 'write "prefix", or "header:" and the name of a request header')
    return text


def _shape_of_endpoints(written: object) -> str:
    return LIST if isinstance(written, (list, tuple)) else OBJECT


_Argument = Annotated[str, AfterValidator(_passable)]
_Seconds = Annotated[float, Field(ge=0)]
_PositiveSeconds = Annotated[float, Field(gt=0)]
_ServerPath = Annotated[str, Field(pattern=_SERVER_PATH)]


class Frozen(BaseModel):
    """Of the same strictness, and without any behaviour."""

    # hide_input_in_errors: a validation error's text must not carry a value, which may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ModelOptions(Frozen):
    """The keys of a model that mean in the file what they mean in the program."""

    command: Annotated[str, AfterValidator(_passable), AfterValidator(_program)] | None = Field(
        None,
        description=(
            "The program that serves the model, found on PATH or by its path; no shell is involved. Without "
            "it someone else runs the server and the gateway only forwards."
        ),
    )
    args: Annotated[tuple[_Argument, ...], Field(strict=False)] = Field(
        (), description="The program's arguments, one string each. Nothing in them is expanded."
    )
    aliases: Annotated[tuple[Annotated[str, AfterValidator(_alias)], ...], Field(strict=False)] = Field(
        (), description="More names for the model on the unified /v1."
    )
    idle_timeout: _PositiveSeconds | None = Field(
        None,
        description=(
            "Seconds without a request after which the server is stopped, or put to sleep; the next request brings it "
            "back. None: never."
        ),
    )
    group: Annotated[str, AfterValidator(_group)] | None = Field(
        None, description="Models that name the same group share one slot: only one of them is awake at a time."
    )
    sleep: Annotated[int, Field(ge=1, le=2)] | None = Field(
        None,
        description=(
            "Put a vLLM with --enable-sleep-mode to sleep at this level instead of stopping it: 1 keeps the weights in "
            "main memory, 2 reads them again."
        ),
    )
    startup_timeout: _PositiveSeconds = Field(
        900.0, description="Seconds from the start of the program until its server must be ready."
    )
    stop_timeout: _Seconds = Field(30.0, description="Seconds between SIGTERM and SIGKILL.")
    restart_policy: Annotated[RestartPolicy, Field(strict=False)] = Field(
        RestartPolicy.ON_FAILURE,
        description=(
            'What to do when the program ends and nobody asked for it: "no": nothing; "on-failure": start it'
            ' again, whatever its exit code, at most max_restarts times in a row; "always": the same without'
            " giving up."
        ),
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3,
        description=(
            "Restarts in a row; the failure after the last one makes the model failed. A minute of being "
            "ready resets it."
        ),
    )
    restart_delay: Annotated[float, Field(ge=0, le=60)] = Field(
        1.0, description="Seconds before the first restart; doubled each time, at most 60."
    )
    liveness: bool = Field(
        False,
        description="Restart a server that has requests inside and makes no progress for stall_timeout seconds.",
    )
    stall_timeout: _PositiveSeconds = Field(
        300.0,
        description=(
            "Seconds without a byte of any answer and without a step of vLLM's engine; looked at only with liveness."
        ),
    )
    verify_listener: bool = Field(
        True,
        description=(
            "Whether the server's listener must belong to the program's own processes. False for a launcher "
            "whose server is not its child (docker run)."
        ),
    )
    max_concurrency: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Requests inside the server at once; more wait for their turn. None: no limit."
    )
    max_queue: Annotated[int, Field(ge=0)] = Field(
        512, description="Requests that may wait, for the model to load or for their turn; one more is refused."
    )
    queue_timeout: _Seconds = Field(
        600.0, description="The longest, in seconds, that a request waits for the model to load or for its turn."
    )
    connect_timeout: _PositiveSeconds = Field(5.0, description="Seconds to connect to the server.")
    first_byte_timeout: _PositiveSeconds | None = Field(
        None,
        description=(
            "Seconds from the request to the first byte of the answer; none: no limit, since generation is slow."
        ),
    )
    stream_idle_timeout: _PositiveSeconds | None = Field(
        None, description="Seconds of silence inside an answer; none: no limit."
    )
    replicas: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description=(
            "Copies of the server, each started with the --uds PATH (vLLM) or --port PORT (others) that the gateway "
            "chooses."
        ),
    )
    gpus: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = Field(
        (), description="Devices dealt out evenly among the replicas, as CUDA_VISIBLE_DEVICES."
    )
    affinity: Annotated[str, AfterValidator(_affinity)] | None = Field(
        None,
        description=(
            'Which of several replicas gets a request: "header:NAME": for one value of this header the same; "prefix": '
            "the one that has seen the longest part of the prompt. None: the one with the fewest requests inside."
        ),
        json_schema_extra={"pattern": _AFFINITY.pattern},
    )
    extra_paths: Annotated[tuple[Annotated[str, AfterValidator(_extra_path)], ...], Field(strict=False)] = Field(
        (),
        description=(
            "More paths of the server to open to clients: absolute at its root, exact, or a prefix that ends in *."
        ),
    )


class EndpointsEntry(Frozen):
    """Where the server listens."""

    base_url: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description=(
            "http or https address of the server, with or without /v1; by default derived from --port or --uds in "
            "args; a vLLM without either gets a Unix socket. Required without command."
        ),
    )


class EndpointEntry(Frozen):
    """One of several replicas that someone else runs."""

    base_url: Annotated[str, Field(min_length=1)] = Field(
        description="http or https address of the server, with or without /v1."
    )


class ModelEntry(ModelOptions):
    """One entry of llmModels, as written."""

    env: Annotated[dict[_Argument, _Argument], Field(strict=False)] = Field(
        {},
        description=(
            "Variables added to the gateway's own environment (less FLUIDMCP_*). ${NAME} expands from the "
            "gateway's environment, $${ is a literal ${."
        ),
    )
    start: Annotated[Start, Field(strict=False)] | None = Field(
        None,
        description=(
            '"eager": with the gateway; "on_demand": with its first request. By default eager, in a group on_demand; at'
            " most one model of a group is eager."
        ),
    )
    endpoints: Annotated[
        Annotated[EndpointsEntry, Tag(OBJECT)]
        | Annotated[tuple[EndpointEntry, ...], Field(strict=False, min_length=1), Tag(LIST)],
        Discriminator(_shape_of_endpoints),
    ] = Field(
        EndpointsEntry(),
        description="The address of the model's server; a list without command: replicas run by someone else.",
    )
    readiness_path: _ServerPath | None = Field(
        None,
        description=(
            "Path on the server's root that answers 200 when it is ready; by default /health, without "
            "command /v1/models."
        ),
    )
    api_key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Key that the gateway sends to the server; may be ${NAME}."
    )
