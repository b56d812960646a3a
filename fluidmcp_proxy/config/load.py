"""From a file, or a document made in code, to a ``GatewayConfig``.

The first fault ends it with a ``ConfigError``: first the document as such, then the top level, ``gateway``, the models
in their order, and at last what must hold between them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluidmcp_proxy.errors import ConfigError

from .advice import warnings_for
from .checks import check_aliases, check_groups, check_keys, check_upstreams
from .document import read_document
from .entry import parse_entry
from .faults import json_path, kind, shown, unknown_key
from .models import GatewayConfig, ModelConfig
from .options import MODEL_ID, RESERVED_IDS
from .settings import environment, read_settings
from .wrapper import wrapper_warnings

TOP_LEVEL = ("llmModels", "gateway", "mcpServers", "$schema")
"""The keys of a file. ``$schema`` is for editors and ignored."""


def load_config(path: str | os.PathLike[str], **overrides: Any) -> GatewayConfig:
    """Read, check and freeze the configuration in the file at ``path``.

    ``overrides`` are settings (``host``, ``port`` …) that win over the environment and the file; None is not given.
    Nothing but this one file is read. Raises ``ConfigError``, whose text is one line and holds no secret.
    """
    name = os.fsdecode(path)
    try:
        document = read_document(name)
    except ConfigError as error:
        raise located(error, name) from error.__cause__
    return parse_config(document, source=path, **overrides)


def parse_config(
    document: Mapping[str, Any],
    *,
    source: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    **overrides: Any,
) -> GatewayConfig:
    """The same for a document that is already in memory; ``environ`` replaces the process's environment."""
    name = "" if source is None else os.fsdecode(source)
    file = None if source is None else Path(os.path.abspath(name))
    variables = environment() if environ is None else environ
    try:
        return _parse(document, file, variables, overrides)
    except ConfigError as error:
        raise located(error, name) from None


def located(error: ConfigError, source: str) -> ConfigError:
    """``error`` with the file it is about, if it has no source yet."""
    if error.source or not source:
        return error
    name = shown(source, limit=400)[1:-1]
    return ConfigError(error.code, error.problem, remedy=error.remedy, path=error.path, source=name)


def _parse(
    document: object, source: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> GatewayConfig:
    sections = _sections(document)
    folder = None if source is None else source.parent
    settings = read_settings(sections["gateway"], environ=environ, overrides=overrides, folder=folder)
    settings = settings if source is None else settings.model_copy(update={"config": source})
    models = {model_id: _model(model_id, entry, environ) for model_id, entry in sections["llmModels"].items()}
    check_aliases(models)
    check_upstreams(models, settings)
    check_groups(models)
    check_keys(models, settings, environ)
    warnings = [warning for model in models.values() for warning in warnings_for(model, environ)]
    warnings += wrapper_warnings(sections["mcpServers"], sections["llmModels"])
    return GatewayConfig(models=models, settings=settings, source=source, warnings=tuple(warnings))


def _sections(document: object) -> dict[str, Mapping[str, Any]]:
    """The three sections of the top level, checked to be objects, absent ones empty; at least one model."""
    if not isinstance(document, Mapping):
        problem = f"the top level must be an object, not {kind(document)}"
        raise ConfigError("config_invalid_type", problem, remedy='write {"llmModels": {…}}')
    for key in document:
        if key not in TOP_LEVEL:
            raise unknown_key(key, TOP_LEVEL)
    sections: dict[str, Mapping[str, Any]] = {}
    for name in ("llmModels", "gateway", "mcpServers"):
        section = document.get(name, {})
        if not isinstance(section, Mapping):
            code = "config_invalid_type" if name == "llmModels" else "invalid_value"
            raise ConfigError(
                code, f"must be an object, not {kind(section)}", path=name, remedy=f'write "{name}": {{…}}'
            )
        sections[name] = section
    if not sections["llmModels"]:
        raise _no_models(sections["mcpServers"])
    return sections


def _no_models(servers: Mapping[str, Any]) -> ConfigError:
    deprecated = wrapper_warnings(servers, {})
    remedy = 'write "llmModels": {"vllm": {"command": "vllm", "args": ["serve", "MODEL", "--port", "8001"]}}'
    if deprecated:
        remedy = deprecated[0]
    return ConfigError("no_models", "there is no model to serve", path="llmModels", remedy=remedy)


def _model(model_id: object, entry: object, environ: Mapping[str, str]) -> ModelConfig:
    where = json_path("llmModels", model_id if isinstance(model_id, str) else str(model_id))
    if not isinstance(model_id, str) or not MODEL_ID.fullmatch(model_id):
        problem = f"{shown(model_id)} cannot be a model's id"
        remedy = "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
        raise ConfigError("invalid_model_id", problem, path=where, remedy=remedy)
    if model_id in RESERVED_IDS:
        problem = f"{shown(model_id)} is a path of the gateway"
        remedy = f"use another id; reserved are {', '.join(RESERVED_IDS)}"
        raise ConfigError("reserved_model_id", problem, path=where, remedy=remedy)
    return parse_entry(model_id, entry, environ)
