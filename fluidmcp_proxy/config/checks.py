"""What must hold between models, and between a model and the gateway.

Compared as written: no name is resolved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fluidmcp_proxy.errors import ConfigError

from .arguments import read_arguments
from .endpoint import LOOPBACK, Endpoint, canonical_host
from .faults import json_path, shown
from .models import ModelConfig
from .options import RESERVED_IDS, Start
from .replicas import replica_ids
from .settings import Settings, variable
from .sources import is_loopback


def check_upstreams(models: Mapping[str, ModelConfig], settings: Settings) -> None:
    """Raise ``ConfigError``: ``upstream_is_gateway`` or ``duplicate_upstream``."""
    for model in models.values():
        _refuse_gateway(model, settings)
    _refuse_duplicates(models.values())
    _refuse_names_of_replicas(models)


def check_groups(models: Mapping[str, ModelConfig]) -> None:
    """Raise ``ConfigError`` ``invalid_value``: two models of a group cannot both be awake from the start."""
    first: dict[str, ModelConfig] = {}
    for model in models.values():
        if model.command is None or model.group is None or model.start is not Start.EAGER:
            continue
        other = first.setdefault(model.group, model)
        if other is not model:
            problem = f"{shown(other.id)} of the same group is eager, too, and only one of them can be awake"
            where = json_path("llmModels", model.id, "start")
            raise ConfigError("invalid_value", problem, path=where, remedy='write "on_demand" here')


def check_aliases(models: Mapping[str, ModelConfig]) -> None:
    """Raise ``ConfigError`` ``invalid_value``: an alias that is reserved, or a model's id or alias already."""
    taken = {name: f"is the id of model {shown(name)}" for name in models}
    taken |= dict.fromkeys(RESERVED_IDS, "is a path of the gateway")
    for model in models.values():
        for index, alias in enumerate(model.aliases):
            if alias in taken:
                where = json_path("llmModels", model.id, "aliases", index)
                raise ConfigError("invalid_value", f"{shown(alias)} {taken[alias]}", path=where, remedy="rename it")
            taken[alias] = f"is an alias of model {shown(model.id)} already"


def check_keys(models: Mapping[str, ModelConfig], settings: Settings, environ: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` ``invalid_value``: two keys that are one or share a name, a model that there is not."""
    names: dict[str, str] = {}
    digests: dict[str, str] = {}
    for setting, keys in (("api_keys", settings.api_keys), ("admin_keys", settings.admin_keys)):
        source = variable(setting) if environ.get(variable(setting)) else ""
        for place, key in enumerate(keys):
            where = json_path(place) if source else json_path("gateway", setting, place)
            problem = remedy = ""
            if key.name in names:
                problem, remedy = f"another key is called {shown(key.name)}, too", "rename one of them"
            elif key.sha256 in digests:
                problem, remedy = f"is the same key as {shown(digests[key.sha256])}", "remove one of them"
            elif unknown := [model for model in key.models or () if model not in models]:
                problem, remedy = f"there is no model {shown(unknown[0])}", f"the models are {', '.join(models)}"
            if problem:
                raise ConfigError("invalid_value", problem, path=where, remedy=remedy, source=source)
            names[key.name] = digests[key.sha256] = key.name


def check_exposure(settings: Settings) -> None:
    """Raise ``ConfigError`` ``invalid_value``: others can reach the address that is bound, and no key is asked for."""
    if is_loopback(settings.host) or settings.api_keys or settings.allow_open:
        return
    problem = f"{settings.host} can be reached from elsewhere, and there are no api_keys: anybody may use the models"
    remedy = "set api_keys (FLUIDMCP_API_KEYS), or allow_open (FLUIDMCP_ALLOW_OPEN=true, --allow-open) if that is meant"
    raise ConfigError("invalid_value", problem, path="gateway.host", remedy=remedy)


def _refuse_gateway(model: ModelConfig, settings: Settings) -> None:
    if (canonical_host(settings.host), settings.port) not in [endpoint.address for endpoint in model.endpoints]:
        return
    problem = f"port {settings.port} is the gateway's own"
    remedy = "give the server another port (and its --port), or set the gateway's port"
    raise ConfigError("upstream_is_gateway", problem, path=_where(model), remedy=remedy)


def _refuse_duplicates(models: Iterable[ModelConfig]) -> None:
    first: dict[tuple[str, int], ModelConfig] = {}
    for model in models:
        for endpoint in model.endpoints:
            other = first.setdefault(endpoint.address, model)
            if other is model or (model.command is None and other.command is None):
                continue
            raise _duplicate(model, other, endpoint)


def _duplicate(model: ModelConfig, other: ModelConfig, endpoint: Endpoint) -> ConfigError:
    where, remedy = _where(model), "give each server its own port, in args and base_url"
    host, port = endpoint.address
    place = f"port {port}{'' if host == LOOPBACK else ' of ' + host}"
    option = read_arguments(model.command or "", model.args).uds
    if endpoint.uds is not None and option is not None:
        place, remedy = f"socket {host.removeprefix('unix:')}", "give each server its own --uds, or none"
        where = json_path("llmModels", model.id, "args", option.index)
    problem = f"{shown(other.id)} has the same address ({place})"
    return ConfigError("duplicate_upstream", problem, path=where, remedy=remedy)


def _refuse_names_of_replicas(models: Mapping[str, ModelConfig]) -> None:
    for model in models.values():
        for name in replica_ids(model):
            if name in models:
                problem, remedy = f"a replica of {shown(model.id)} has this name", "use another id"
                raise ConfigError("invalid_model_id", problem, path=json_path("llmModels", name), remedy=remedy)


def _where(model: ModelConfig) -> str:
    return json_path("llmModels", model.id, "endpoints", "base_url")
