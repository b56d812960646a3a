"""The gateway's own answers: health, readiness, the state of the models. Values in, bytes out."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, NamedTuple

from fluidmcp_proxy.models.catalog import Catalog
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import ModelStatus

__all__ = ["JSON", "PROMETHEUS", "Answer", "health", "listed", "listing", "model", "models", "ready"]

JSON = b"application/json"
PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"


class Answer(NamedTuple):
    """What is sent."""

    status: int
    body: bytes
    media_type: bytes = JSON


def health() -> Answer:
    """200 while the gateway lives, whatever its models do."""
    return _json(200, {"status": "ok"})


def ready(scheduler: Scheduler, names: Collection[str], *, closing: bool) -> Answer:
    """200 when every eager model is ready, or was stopped or put to sleep on purpose, else 503; states of ``names``."""
    states = {name: status.state for name, status in scheduler.statuses().items() if name in names}
    is_ready = not closing and not scheduler.missing()
    return _json(200 if is_ready else 503, {"ready": is_ready, "models": states})


def models(scheduler: Scheduler, names: Collection[str]) -> Answer:
    """The state of each of ``names``."""
    statuses = scheduler.statuses().values()
    return _json(200, {"models": [_described(scheduler, status) for status in statuses if status.id in names]})


def model(scheduler: Scheduler, name: str) -> Answer:
    """The state of one model."""
    return _json(200, _described(scheduler, scheduler.statuses()[name]))


def listing(catalog: Catalog) -> Answer:
    """OpenAI's list of models: every name, whether its model is running or not."""
    return _json(200, {"object": "list", "data": list(catalog.cards())})


def listed(catalog: Catalog, name: str) -> Answer:
    """One element of it. Raises ``ModelNotFound``, ``AmbiguousModel``."""
    return _json(200, catalog.card(name))


def _described(scheduler: Scheduler, status: ModelStatus) -> dict[str, Any]:
    counts = {"in_flight": scheduler.in_flight(status.id), "queued": scheduler.waiting(status.id)}
    return {**asdict(status), **counts}


def _json(status: int, value: object) -> Answer:
    return Answer(status, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
