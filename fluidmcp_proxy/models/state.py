"""The states of a model and the snapshot that others get of them.

Only a supervisor makes one; nobody decides from a snapshot, since it is old as soon as it exists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum, StrEnum, auto

__all__ = ["ModelState", "ModelStatus", "Phase", "ReplicaStatus"]


class ModelState(StrEnum):
    """Where a model is in its life.

    ``stopped`` means that its whole tree of processes is gone, not only the server's first process. ``backoff`` is the
    pause before a restart; ``failed`` is left when the model is started again. ``asleep`` and ``waking`` are a
    vLLM's in sleep mode: its processes live, its GPU memory is free; while it is put to sleep it is ``stopping``.
    """

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    ASLEEP = "asleep"
    WAKING = "waking"
    FAILED = "failed"

    def may_become(self, new: ModelState) -> bool:
        """Whether the life of a model leads from this state to ``new`` in one step."""
        return new in _NEXT[self]


_NEXT: dict[ModelState, frozenset[ModelState]] = {
    ModelState.STOPPED: frozenset({ModelState.STARTING}),
    ModelState.STARTING: frozenset({ModelState.READY, ModelState.BACKOFF, ModelState.FAILED, ModelState.STOPPING}),
    ModelState.READY: frozenset({ModelState.BACKOFF, ModelState.FAILED, ModelState.STOPPING}),
    ModelState.BACKOFF: frozenset({ModelState.STARTING, ModelState.FAILED, ModelState.STOPPING}),
    ModelState.STOPPING: frozenset({ModelState.STOPPED, ModelState.ASLEEP}),
    ModelState.ASLEEP: frozenset({ModelState.WAKING, ModelState.STOPPING}),
    ModelState.WAKING: frozenset({ModelState.READY, ModelState.BACKOFF, ModelState.FAILED, ModelState.STOPPING}),
    ModelState.FAILED: frozenset({ModelState.STARTING, ModelState.STOPPED}),
}


class Phase(Enum):
    """What a model is up to, as far as it matters to whoever wants to use it.

    It follows what was asked at once, while the state follows what has been done: a model that was asked to start is
    ``COMING`` before its state is ``starting``.
    """

    RESTING = auto()
    """Holds nothing that another model could want, and is not wanted itself: stopped, asleep or failed."""
    COMING = auto()
    READY = auto()
    GOING = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """What is known of a model at one moment.

    ``since`` is a Unix time in seconds; ``address`` is where the server listens that was started last,
    ``unix:PATH`` for a Unix socket; ``restarts`` counts those in a row, ``spawns`` all of them; ``last_exit`` says how
    its server ended last, ``reason`` is a word for a program (``port_in_use``, ``exited``, ``startup_timeout`` …) and
    ``message`` a sentence for a person, both of the last failure; while it loads,
    ``progress`` is what the server said last, ``stage`` what it does (``models.progress.Stage``) and ``percent`` how
    much of that is done, where it says so; ``load_seconds`` is how long its last start, or waking up, took until ready;
    ``replicas`` has each server of a model with several, and the rest is then
    about the best of them.
    """

    id: str
    state: ModelState
    since: float
    pid: int | None = None
    address: str | None = None
    restarts: int = 0
    spawns: int = 0
    last_exit: str | None = None
    reason: str | None = None
    message: str | None = None
    progress: str | None = None
    stage: str | None = None
    percent: int | None = None
    load_seconds: float | None = None
    replicas: tuple[ReplicaStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus(ModelStatus):
    """What is known of one of several servers of a model, with the requests inside it."""

    in_flight: int

    @classmethod
    def of(cls, status: ModelStatus, in_flight: int) -> ReplicaStatus:
        """``status`` with the count."""
        values = {field.name: getattr(status, field.name) for field in fields(status)}
        return cls(**values, in_flight=in_flight)
