"""The deprecated way to configure vLLM, a JSON-RPC wrapper under ``mcpServers``, and the entry that replaces it.

It recognises and translates; ``migrate`` rewrites files with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .arguments import VLLM_PORT, options, read_arguments
from .faults import json_path, printable, shown
from .options import MODEL_ID, RESERVED_IDS

SCRIPT = "vllm_server.py"
MODEL_VARIABLE = "VLLM_MODEL_NAME"
FIRST_PORT = 8001

# Variables of the wrapper with an obvious argument of `vllm serve`.
ARGUMENTS = {
    "VLLM_TENSOR_PARALLEL_SIZE": "--tensor-parallel-size",
    "VLLM_PIPELINE_PARALLEL_SIZE": "--pipeline-parallel-size",
    "VLLM_GPU_MEMORY_UTILIZATION": "--gpu-memory-utilization",
    "VLLM_MAX_MODEL_LEN": "--max-model-len",
    "VLLM_DTYPE": "--dtype",
    "VLLM_QUANTIZATION": "--quantization",
    "VLLM_MAX_NUM_SEQS": "--max-num-seqs",
    "VLLM_SEED": "--seed",
}
MODEL_PLACEHOLDER = "MODEL"


def is_wrapper(entry: object) -> bool:
    """Whether an entry of ``mcpServers`` is the deprecated vLLM wrapper."""
    if not isinstance(entry, Mapping):
        return False
    env, args = entry.get("env"), entry.get("args")
    if isinstance(env, Mapping) and MODEL_VARIABLE in env:
        return True
    words = [entry.get("command"), *(args if isinstance(args, (list, tuple)) else ())]
    return any(isinstance(word, str) and os.path.basename(word) == SCRIPT for word in words)


def wrappers(servers: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The deprecated entries among ``servers``."""
    for name, entry in servers.items():
        if isinstance(name, str) and is_wrapper(entry):
            yield name, entry


def replacement(entry: Mapping[str, Any], port: int) -> dict[str, Any]:
    """The ``llmModels`` entry that serves what the wrapper did, on ``port``."""
    written = entry.get("env")
    env = dict(written) if isinstance(written, Mapping) else {}
    model = _text(env.pop(MODEL_VARIABLE, None)) or _model_argument(entry) or MODEL_PLACEHOLDER
    args = ["serve", model, "--port", str(port)]
    for variable, option in ARGUMENTS.items():
        value = _text(env.get(variable))
        if value and "${" not in value:
            args += [option, value]
            del env[variable]
    texts = {str(name): raw if isinstance(raw, str) else json.dumps(raw, default=str) for name, raw in env.items()}
    return {"command": "vllm", "args": args, "env": texts, "endpoints": {"base_url": f"http://localhost:{port}/v1"}}


def model_id(name: str, taken: Iterable[str]) -> str:
    """A legal and free model id as close to the server's name as possible."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)[:58]
    kept = kept.lstrip("._-") or "vllm"
    used = {*taken, *RESERVED_IDS}
    candidates = (kept, *(f"{kept}-{number}" for number in range(2, len(used) + 3)))
    return next(candidate for candidate in candidates if candidate not in used and MODEL_ID.fullmatch(candidate))


def free_port(models: Mapping[str, Any], taken: Iterable[int] = ()) -> int:
    """The first port from 8001 on that no model in ``models`` states."""
    used = {*taken, *(port for entry in models.values() for port in stated_ports(entry))}
    return next(port for port in range(FIRST_PORT, 65536) if port not in used)


def stated_ports(entry: object) -> Iterator[int]:
    """The ports that an entry's arguments and address name, as far as they are well-formed."""
    if not isinstance(entry, Mapping):
        return
    raw = entry.get("args")
    args = [word for word in raw if isinstance(word, str)] if isinstance(raw, (list, tuple)) else []
    command = entry.get("command")
    if isinstance(command, str) and read_arguments(command, args).is_vllm:
        yield VLLM_PORT
    endpoints = entry.get("endpoints")
    url = endpoints.get("base_url") if isinstance(endpoints, Mapping) else None
    texts = [value for _, name, value in options(args) if name == "--port"]
    texts.append(url.partition("://")[2].partition("/")[0].rpartition(":")[2] if isinstance(url, str) else None)
    yield from (int(text) for text in texts if text and text.isascii() and text.isdigit() and len(text) < 6)


def wrapper_warnings(servers: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """One line for each deprecated entry, with the entry to write instead; no value of its env is shown."""
    warnings = []
    ports: list[int] = []
    ids: list[str] = []
    for name, entry in wrappers(servers):
        ports.append(free_port(models, ports))
        ids.append(model_id(name, [*models, *ids]))
        new = replacement(entry, ports[-1])
        kept = new.pop("env")
        rest = f" and keep {', '.join(map(shown, kept))} in its env" if kept else ""
        model = printable(json.dumps({ids[-1]: new}))
        warnings.append(
            f"{json_path('mcpServers', name)}: the JSON-RPC wrapper for vLLM is deprecated and not served; "
            f'write "llmModels": {model}{rest} (fluidmcp migrate does it)'
        )
    return warnings


def _text(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value)


def _model_argument(entry: Mapping[str, Any]) -> str | None:
    raw = entry.get("args")
    args = [word for word in raw if isinstance(word, str)] if isinstance(raw, (list, tuple)) else []
    return next((value for _, name, value in options(args) if name in ("--model", "--model-name") and value), None)
