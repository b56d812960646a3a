"""The copies of a model's server: what may be written of them, and each copy's own configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fluidmcp_proxy.errors import ConfigError

from .arguments import ServerArguments, read_arguments
from .endpoint import Endpoint
from .faults import json_path
from .models import Environment, ModelConfig
from .options import EndpointsEntry, ModelEntry

_DEVICES = "CUDA_VISIBLE_DEVICES"


def check_replicas(written: ModelEntry, arguments: ServerArguments, path: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` for ``replicas`` and ``gpus`` that cannot be had with the rest of the entry."""
    _check_devices(written, path)
    if written.replicas == 1:
        return
    if written.command is None:
        problem, remedy = "only servers that the gateway starts can be copied", "write endpoints as a list instead"
        raise ConfigError("invalid_value", problem, path=json_path(*path, "replicas"), remedy=remedy)
    for name, option in (("--port", arguments.port), ("--uds", arguments.uds)):
        if option is not None:
            problem = f"{name} would be the same for {written.replicas} replicas"
            where = json_path(*path, "args", option.index)
            raise ConfigError("invalid_args", problem, path=where, remedy="leave it out: the gateway chooses addresses")
    if isinstance(written.endpoints, EndpointsEntry) and written.endpoints.base_url is not None:
        problem = f"one address for {written.replicas} replicas"
        where = json_path(*path, "endpoints", "base_url")
        raise ConfigError("invalid_base_url", problem, path=where, remedy="leave it out: the gateway chooses addresses")


def _check_devices(written: ModelEntry, path: tuple[str, ...]) -> None:
    where, gpus = json_path(*path, "gpus"), written.gpus
    if gpus and _DEVICES in written.env:
        problem = f"{_DEVICES} in env says the same"
        raise ConfigError("invalid_value", problem, path=where, remedy="remove one of them")
    if len(gpus) % written.replicas:
        problem = f"{len(gpus)} cannot be dealt out evenly among {written.replicas} replicas"
        raise ConfigError("invalid_value", problem, path=where, remedy="write as many for each replica")
    if any(len(set(share)) < len(share) for share in _shares(gpus, written.replicas)):
        raise ConfigError("invalid_value", "a replica has one device twice", path=where, remedy="write it once")


def check_list(endpoints: tuple[Endpoint, ...], path: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` for endpoints of a list that are no replicas of each other."""
    for index, endpoint in enumerate(endpoints):
        where = json_path(*path, "endpoints", index, "base_url")
        if endpoint.address in [other.address for other in endpoints[:index]]:
            raise ConfigError("duplicate_upstream", "is in the list already", path=where, remedy="remove it")
        if endpoint.root != endpoints[0].root:
            problem = "its path before /v1 is not that of the first"
            raise ConfigError("invalid_base_url", problem, path=where, remedy="write one path in all of them")


def replicas_of(model: ModelConfig) -> tuple[ModelConfig, ...]:
    """One configuration for each server: the model's own if there is one, else copies with the ids ``ID.0``, ``ID.1`` …

    Each has its share of the devices, as ``CUDA_VISIBLE_DEVICES``, or its address in the list.
    """
    shares = _shares(model.gpus, model.replicas)
    copies = tuple(
        model.model_copy(update={"env": Environment({**model.env, _DEVICES: ",".join(map(str, share))})})
        if share
        else model
        for share in shares
    )
    if model.command is None:
        copies = tuple(model.model_copy(update={"endpoints": (endpoint,)}) for endpoint in model.endpoints)
    if len(copies) == 1:
        return copies
    return tuple(copy.model_copy(update={"id": name}) for copy, name in zip(copies, replica_ids(model), strict=True))


def replica_ids(model: ModelConfig) -> Iterator[str]:
    """What replicas are called in logs and in the names of their output files."""
    count = max(model.replicas, len(model.endpoints))
    return (f"{model.id}.{number}" for number in range(count if count > 1 else 0))


def gets_a_socket(model: ModelConfig) -> bool:
    """Whether the server is told ``--uds`` at its launch; else it is told ``--port``, if it has no address yet.

    A socket cannot be found in a container that the program only launches.
    """
    is_vllm = model.command is not None and read_arguments(model.command, model.args).is_vllm
    return is_vllm and not model.endpoints and model.verify_listener


def affinity_header(affinity: str | None) -> bytes | None:
    """The header that ``affinity`` names, in lower case."""
    match = re.fullmatch(r"header:(.+)", affinity or "")
    return match[1].lower().encode("ascii") if match else None


def _shares(gpus: tuple[int, ...], replicas: int) -> list[tuple[int, ...]]:
    """Neighbours stay together: they are more likely to have a fast link."""
    size = len(gpus) // replicas
    return [gpus[number * size : (number + 1) * size] for number in range(replicas)]
