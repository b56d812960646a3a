"""The gateway's own answers: health, readiness, the state of the models, the status page. Values in, bytes out."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote

from fluidmcp_proxy.models.catalog import Catalog
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import ModelStatus

__all__ = [
    "JSON",
    "PROMETHEUS",
    "Answer",
    "below_itself",
    "described",
    "health",
    "listed",
    "listing",
    "model",
    "models",
    "ready",
    "static",
]

JSON = b"application/json"
PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"

_MEDIA_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline, and the page in nobody's frame, where a click could be led astray."""
_STATIC_HEADERS = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)


class Answer(NamedTuple):
    """What is sent."""

    status: int
    body: bytes
    media_type: bytes = JSON
    headers: Sequence[tuple[bytes, bytes]] = ()


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
    return _json(200, {"models": [described(scheduler, status) for status in statuses if status.id in names]})


def model(scheduler: Scheduler, name: str) -> Answer:
    """The state of one model."""
    return _json(200, described(scheduler, scheduler.statuses()[name]))


def listing(catalog: Catalog) -> Answer:
    """OpenAI's list of models: every name, whether its model is running or not."""
    return _json(200, {"object": "list", "data": list(catalog.cards())})


def listed(catalog: Catalog, name: str) -> Answer:
    """One element of it. Raises ``ModelNotFound``, ``AmbiguousModel``."""
    return _json(200, catalog.card(name))


@cache
def static(name: str) -> Answer:
    """A file of the status page. It has nothing of the configuration, and is read when it is asked for first."""
    content = files("fluidmcp_proxy.gateway").joinpath("static", name).read_bytes()
    return Answer(200, content, _MEDIA_TYPES[name.rpartition(".")[2]], _STATIC_HEADERS)


def below_itself(path: str) -> Answer:
    """From a mount point to the same with a slash at its end, without which the page's relative URLs lead astray.

    Relative, since a proxy in front may have cut off what stands before it.
    """
    return Answer(307, b"", headers=[(b"location", f"./{quote(path.rpartition('/')[2], safe='')}/".encode())])


def described(scheduler: Scheduler, status: ModelStatus) -> dict[str, Any]:
    """What is told of one model."""
    counts = {"in_flight": scheduler.in_flight(status.id), "queued": scheduler.waiting(status.id)}
    return {**asdict(status), **counts}


def _json(status: int, value: object) -> Answer:
    return Answer(status, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
