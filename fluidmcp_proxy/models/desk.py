"""What the scheduler keeps of each model, and of what models share: plain state, changed by the scheduler only."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.models.pace import Pace
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import Phase

if TYPE_CHECKING:
    from fluidmcp_proxy.models.lease import Lease

__all__ = ["Desk", "Inside", "Slot", "shares_a_slot"]


class Slot:
    """What only one model at a time can have: the room of a group; a model without a group has one to itself.

    ``line`` are the models that want it, in their order; a model whose turn is over goes to its end. While others
    wait, ``contested_since`` is when the holder's turn began to be counted, and ``served`` how many requests have
    entered it since.
    """

    __slots__ = ("contested_since", "desks", "holder", "line", "served")

    def __init__(self) -> None:
        self.desks: list[Desk] = []
        self.holder: Desk | None = None
        self.line: dict[Desk, None] = {}
        self.contested_since: float | None = None
        self.served = 0


class Desk:
    """One model: the requests ``inside`` its server, those in the ``queue``, first come first served, and its limits.

    ``phase`` is its server's, as last seen. ``gated``: a request may not go straight to a server that is ready;
    ``attentive``: something may follow from a request's end. ``asked``: somebody has started it and it is not ready
    yet, which counts like a waiting request. ``kept``: it stays although nobody waits for it. ``promised_until``:
    somebody was told to come back, and is waited for until then. ``barred``: stopped by hand. ``forgiven``: it may be
    started again although it has failed. ``idle_since``: when the last request left; looked at while none is inside.
    ``progress``: bytes answered and requests ended by leases that are over. ``retired``: the configuration has no such
    model any more, or another one of its name.
    """

    __slots__ = (
        "asked", "attentive", "barred", "emptied", "failed_since", "forgiven", "gated", "idle_since", "idle_timeout",
        "inside", "kept", "limit", "max_queue", "name", "pace", "phase", "progress", "promised_until", "queue",
        "retired", "server", "slot",
    )  # fmt: skip

    def __init__(self, server: Server, slot: Slot) -> None:
        config = server.config
        self.name = config.id
        self.server = server
        self.slot = slot
        self.limit = config.max_concurrency
        self.max_queue = config.max_queue
        self.idle_timeout = config.idle_timeout if config.command is not None else None
        self.gated = self.limit is not None or shares_a_slot(config)
        self.attentive = self.gated or self.idle_timeout is not None
        self.phase = server.phase
        self.inside: set[Lease] = set()
        self.queue: dict[Lease, None] = {}
        self.pace = Pace()
        self.asked = self.kept = self.barred = self.forgiven = self.retired = False
        self.failed_since: float | None = None
        self.promised_until = -inf
        self.idle_since = inf
        self.progress = 0
        self.emptied: anyio.Event | None = None
        slot.desks.append(self)
        if slot.holder is None and self.phase is not Phase.RESTING:
            slot.holder = self

    def __repr__(self) -> str:
        return f"<Desk {self.name!r} {self.phase.name} inside={len(self.inside)} queue={len(self.queue)}>"


class Inside:
    """The requests inside a model's server, as that sees them; ``desk`` is set when the scheduler has admitted it."""

    desk: Desk

    def unanswered(self) -> int:
        """Those that the server owes an answer."""
        return sum(lease.owes_answer for lease in self.desk.inside)

    def progress(self) -> int:
        """A number that grows with every byte that the server answers and every request that it ends."""
        return self.desk.progress + sum(lease.bytes_answered for lease in self.desk.inside)


def shares_a_slot(config: ModelConfig) -> bool:
    """Whether the model's group counts: one that somebody else runs can neither be started nor be put away."""
    return config.group is not None and config.command is not None
