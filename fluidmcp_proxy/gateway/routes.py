"""What a request can be for: the kinds of routes, as values. Which it is, is decided in ``routing``.

Each has a ``label``: what logs and metrics call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import ClassVar, NamedTuple

__all__ = ["Action", "Forward", "ListedModel", "Logs", "ModelPage", "Page", "Route", "StaticFile", "Unified", "Verb"]


class Page(Enum):
    """An answer of the gateway's own."""

    HEALTH = "/health"
    READY = "/ready"
    METRICS = "/metrics"
    MODELS = "/models"
    LIST = "/v1/models"
    STATUS = "/"

    @property
    def label(self) -> str:
        """Its path."""
        return self.value


@dataclass(frozen=True, slots=True)
class ModelPage:
    """The state of one model."""

    model: str
    label: ClassVar[str] = "/models/{model}"


class Verb(StrEnum):
    """What somebody with an admin key can ask of a model."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Action:
    """Something to be done with one model."""

    model: str
    verb: Verb

    @property
    def label(self) -> str:
        """Its path."""
        return f"/models/{{model}}/{self.verb}"


@dataclass(frozen=True, slots=True)
class Logs:
    """What the server of one model prints."""

    model: str
    label: ClassVar[str] = "/models/{model}/logs"


@dataclass(frozen=True, slots=True)
class StaticFile:
    """What the status page is made of besides itself."""

    name: str
    label: ClassVar[str] = "/static/{name}"


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One element of the list at ``/v1/models``."""

    name: str
    label: ClassVar[str] = "/v1/models/{name}"


@dataclass(frozen=True, slots=True)
class Unified:
    """A request below ``/v1/`` for the model that it names itself: ``Router.named`` makes a ``Forward`` of it."""

    label: str


class Forward(NamedTuple):
    """A request for a model's server. ``target`` is the request target there, query included."""

    model: str
    target: bytes
    label: str = "other"


Route = Page | ModelPage | StaticFile | ListedModel | Action | Logs | Unified | Forward
