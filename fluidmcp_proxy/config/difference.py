"""What is another between two configurations, and what of it can be had without a restart: pure."""

from __future__ import annotations

from typing import NamedTuple

from .models import GatewayConfig
from .settings import Settings

__all__ = ["Difference", "difference", "in_force"]

_AT_RUN_TIME = ("api_keys", "admin_keys", "allowed_hosts", "allowed_origins", "body_timeout")
"""The settings that are looked at with each request only."""


class Difference(NamedTuple):
    """The ids of models, in the order of the files, and the settings that are as they were until a restart."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def difference(old: GatewayConfig, new: GatewayConfig) -> Difference:
    """What has to be done to get from ``old`` to ``new``. A model is changed if anything of it is another."""
    return Difference(
        tuple(name for name in new.models if name not in old.models),
        tuple(name for name, model in new.models.items() if name in old.models and old.models[name] != model),
        tuple(name for name in old.models if name not in new.models),
        tuple(
            name
            for name in Settings.model_fields
            if name not in _AT_RUN_TIME and getattr(old.settings, name) != getattr(new.settings, name)
        ),
    )


def in_force(old: Settings, new: Settings) -> Settings:
    """``old`` with what can be changed at run time from ``new``."""
    return old.model_copy(update={name: getattr(new, name) for name in _AT_RUN_TIME})
