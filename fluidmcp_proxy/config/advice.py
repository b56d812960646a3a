"""What is allowed but deserves a warning. Each is one line with a JSON path and without the value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .arguments import read_arguments
from .endpoint import LOOPBACK, canonical_host
from .faults import json_path
from .models import ModelConfig
from .replicas import gets_a_socket, replica_ids
from .secrets import secret_arguments

_DEV_MODE = "VLLM_SERVER_DEV_MODE"
_LAUNCH_ONLY = (
    "start", "idle_timeout", "group", "sleep", "startup_timeout", "stop_timeout", "restart_policy", "max_restarts",
    "restart_delay", "liveness", "stall_timeout", "verify_listener", "gpus"
)  # fmt: skip


def warnings_for(model: ModelConfig, environ: Mapping[str, str]) -> Iterator[str]:
    """The warnings of one model, in the order of its keys."""
    if model.affinity is not None and not any(replica_ids(model)):
        yield f"{json_path('llmModels', model.id, 'affinity')}: has no effect without replicas"
    if model.command is None:
        yield from _unused(model)
        return
    for index in sorted({index for index, _ in secret_arguments(model.args)}):
        where = json_path("llmModels", model.id, "args", index)
        yield f"{where}: a secret in args is visible to every user of this machine; put it into env as ${{NAME}}"
    host = read_arguments(model.command, model.args).host
    if gets_a_socket(model) or (model.endpoint is not None and model.endpoint.uds is not None):
        host = None  # on a Unix socket no port is opened
    if host is not None and host.value in ("0.0.0.0", "::", "[::]"):  # noqa: S104 - compared, not bound
        where = json_path("llmModels", model.id, "args", host.index)
        yield f"{where}: --host {host.value} opens the server to the network, past the gateway; write 127.0.0.1"
    elif host is not None and model.endpoint is not None and host.value and _elsewhere(host.value, model.endpoint.host):
        where = json_path("llmModels", model.id, "args", host.index)
        yield f"{where}: the server listens on this --host only, and base_url names another address"
    for index, argument in enumerate(model.args):
        if "${" in argument:
            where = json_path("llmModels", model.id, "args", index)
            yield f"{where}: ${{…}} is not expanded in args; the program gets it as it stands"
    yield from _dev_mode(model, environ)
    if not model.verify_listener:
        where = json_path("llmModels", model.id, "verify_listener")
        yield f"{where}: false: whatever listens on the port is taken for the model's server"


def _elsewhere(bound: str, reached: str) -> bool:
    """Whether two addresses differ as far as that shows without DNS; a name may be any address."""
    hosts = [canonical_host(host.strip("[]")) for host in (bound, reached)]
    return hosts[0] != hosts[1] and all(host == LOOPBACK or re.fullmatch(r"[0-9.]+|.*:.*", host) for host in hosts)


def _dev_mode(model: ModelConfig, environ: Mapping[str, str]) -> Iterator[str]:
    if model.sleep is not None:
        return
    # vLLM reads it as bool(int(value)).
    if model.env.get(_DEV_MODE, environ.get(_DEV_MODE, "0")).strip() in ("", "0"):
        return
    inside = _DEV_MODE in model.env
    where = json_path("llmModels", model.id, *(("env", _DEV_MODE) if inside else ()))
    yield f"{where}: {_DEV_MODE}=1 opens vLLM's development routes; remove it; for sleep mode, the key sleep is enough"


def _unused(model: ModelConfig) -> Iterator[str]:
    fields = ModelConfig.model_fields
    unused = [name for name in _LAUNCH_ONLY if getattr(model, name) != fields[name].default]
    if model.env:
        unused.insert(0, "env")
    for name in unused:
        yield f"{json_path('llmModels', model.id, name)}: has no effect without a command"
