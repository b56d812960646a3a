"""Whether the models that run together fit on their GPUs, as far as their arguments say: pure, and only an estimate.

vLLM takes ``--gpu-memory-utilization`` of each of its devices when it starts, and fails when that is not free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from .arguments import find_option, read_arguments
from .inheritance import child_environment
from .models import ModelConfig
from .options import Start
from .replicas import replicas_of

__all__ = ["overcommitted"]

_DEFAULT_SHARE = 0.9
"""vLLM's."""


def overcommitted(models: Iterable[ModelConfig], environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """A line for each device of which the vLLMs that start with the gateway want more than there is.

    Models in a group, or on demand, are left out: how many of them are awake at once is not known here.
    """
    wanted: dict[str, dict[str, float]] = {}
    for model in models:
        if model.start is Start.EAGER and model.group is None:
            for copy in replicas_of(model):
                for device, share in _shares(copy, environ):
                    wanted.setdefault(device, {})[copy.id] = share
    for device, shares in wanted.items():
        if (total := math.fsum(shares.values())) > 1 + 1e-6:
            listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            yield (
                f"GPU {device}: {listed}: together {total:g} of its memory; lower --gpu-memory-utilization, or give"
                " the models a group"
            )


def _shares(model: ModelConfig, environ: Mapping[str, str] | None) -> Iterator[tuple[str, float]]:
    """The devices of one server, and how much of each it takes."""
    arguments = read_arguments(model.command or "", model.args)
    variables = child_environment(model, environ)
    if not arguments.is_vllm or arguments.config_file or _runs_on_the_cpu(model, variables):
        return
    share = _number(model, "--gpu-memory-utilization", _DEFAULT_SHARE)
    count = int(_number(model, "--tensor-parallel-size", 1) * _number(model, "--pipeline-parallel-size", 1))
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    devices = map(str, range(count)) if visible is None else iter(part.strip() for part in visible.split(","))
    for _, device in zip(range(count), devices, strict=False):
        if device:
            yield device, share


def _runs_on_the_cpu(model: ModelConfig, variables: Mapping[str, str]) -> bool:
    option = find_option(model.args, "--device")
    return "VLLM_CPU_KVCACHE_SPACE" in variables or (option is not None and option.value == "cpu")


def _number(model: ModelConfig, name: str, default: float) -> float:
    """What cannot be understood is vLLM's to complain about."""
    option = find_option(model.args, name)
    try:
        number = float(option.value or "") if option is not None else default
    except ValueError:
        return default
    return number if 0 <= number < 1000 else default
