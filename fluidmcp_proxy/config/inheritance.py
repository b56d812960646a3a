"""The environment of a model's program: what it inherits from the gateway's, and what is set for it."""

from __future__ import annotations

from collections.abc import Mapping

from .arguments import read_arguments
from .models import ModelConfig
from .settings import PREFIX, environment

KEEP_ALIVE = 3600
"""Seconds that a vLLM started here keeps an idle connection (its own default, 5, races with the client's pool)."""


def child_environment(model: ModelConfig, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a model's program: the gateway's less ``FLUIDMCP_*``, a few defaults, and the model's own.

    ``SPT_NOENV`` keeps setproctitle from erasing the environment that finds stray processes; a long keep-alive avoids
    the race between vLLM's 5 s and the connection pool; unbuffered output shows what a loading server does. vLLM has
    its sleep routes in development mode only.
    """
    environ = environment() if environ is None else environ
    inherited = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    defaults = {"PYTHONUNBUFFERED": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE)}
    forced = {"SPT_NOENV": "1"} | ({"VLLM_SERVER_DEV_MODE": "1"} if model.sleep is not None else {})
    return {**defaults, **inherited, **forced, **model.env}


def server_keep_alive(model: ModelConfig, environ: Mapping[str, str] | None = None) -> float | None:
    """Seconds that the model's server keeps an idle connection; None where that is not known.

    It is for a vLLM started here, which reads it in its environment.
    """
    if model.command is None or not read_arguments(model.command, model.args).is_vllm:
        return None
    try:
        return float(child_environment(model, environ)["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"])
    except ValueError:  # vLLM will say so
        return None
