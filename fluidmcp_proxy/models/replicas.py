"""A model with several servers that do the same: one server to the scheduler, the best of them to whoever looks.

Each replica is kept by its own supervisor, so one that dies is restarted while the others serve. A restart that was
asked for goes from one to the next: out of the choice, drained, stopped, started, ready, and only then the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.models.pool import Pool, Replica
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import ModelState, ModelStatus, Phase, ReplicaStatus
from fluidmcp_proxy.upstream.client import Transport

__all__ = ["ReplicaSet"]

logger = logging.getLogger("fluidmcp_proxy.models")

_BEST_FIRST = (
    ModelState.READY, ModelState.WAKING, ModelState.STARTING, ModelState.BACKOFF, ModelState.STOPPING,
    ModelState.ASLEEP, ModelState.FAILED, ModelState.STOPPED,
)  # fmt: skip


class ReplicaSet:
    """See ``server.Server``. ``pool`` gives each request to one of ``replicas``."""

    def __init__(self, config: ModelConfig, replicas: Sequence[Replica], pool: Pool) -> None:
        self.config = config
        self._replicas = replicas
        self._servers = [replica.server for replica in replicas]
        self._pool = pool
        self._tell: Callable[[], None] = lambda: None
        self._changed = anyio.Event()
        self._roll_asked = False
        for server in self._servers:
            server.observe(self._note)

    def __repr__(self) -> str:
        return f"<ReplicaSet {self.config.id!r} {[str(server.status.state) for server in self._servers]}>"

    # What others may see

    @property
    def servers(self) -> Sequence[Server]:
        """The replicas' own, in their order."""
        return tuple(self._servers)

    @property
    def transport(self) -> Transport | None:
        """The way to those that are ready, while one is."""
        return self._pool if any(server.transport is not None for server in self._servers) else None

    @property
    def phase(self) -> Phase:
        """That of the one which is furthest on the way to being used."""
        if self.transport is not None:
            return Phase.READY
        phases = [server.phase for server in self._servers]
        return next((phase for phase in (Phase.COMING, Phase.GOING) if phase in phases), Phase.RESTING)

    @property
    def status(self) -> ModelStatus:
        """That of the best of them, with all in ``replicas``."""
        each = [server.status for server in self._servers]
        best = min(each, key=lambda status: _BEST_FIRST.index(status.state))
        return replace(
            best,
            id=self.config.id,
            since=min(status.since for status in each if status.state is best.state),
            pid=None,
            address=None,
            restarts=sum(status.restarts for status in each),
            spawns=sum(status.spawns for status in each),
            replicas=tuple(
                ReplicaStatus.of(status, replica.in_flight)
                for status, replica in zip(each, self._replicas, strict=True)
            ),
        )

    def refusal(self) -> GatewayError | None:
        """Why waiting is in vain, if it is for all of them."""
        refusals = [server.refusal() for server in self._servers]
        return None if None in refusals else refusals[0]

    def observe(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called after each change of the above."""
        self._tell = changed

    def _note(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
        self._tell()

    # What others may ask for

    def request_start(self) -> None:
        """Have all of them started, or woken."""
        for server in self._servers:
            server.request_start()

    def request_stop(self) -> None:
        """Have all of them stopped."""
        self._roll_asked = False
        for server in self._servers:
            server.request_stop()

    def request_rest(self) -> None:
        """Have all of them put to sleep, or stopped."""
        self._roll_asked = False
        for server in self._servers:
            server.request_rest()

    def request_restart(self) -> None:
        """Have all of them restarted: one after the other while one is ready, so that there is always one to serve."""
        if self.config.command is not None and self.transport is not None:
            self._roll_asked = True
            self._note()
            return
        for server in self._servers:
            server.request_restart()

    def close(self) -> None:
        """Stop for good; ``run()`` returns once all of them are stopped."""
        self._roll_asked = False
        for server in self._servers:
            server.close()

    # The loop

    async def run(self) -> None:
        """Keep all of them, each in its own loop, until ``close()``."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._roll_when_asked)
            async with anyio.create_task_group() as servers:
                for server in self._servers:
                    servers.start_soon(server.run)
            tasks.cancel_scope.cancel()

    async def _roll_when_asked(self) -> None:
        while True:
            while not self._roll_asked:
                await self._changed.wait()
            self._roll_asked = False
            await self._roll()

    async def _roll(self) -> None:
        """Restart each. What is not ready now goes first; where one does not come back, the others are left alone."""
        for replica in sorted(self._replicas, key=lambda replica: replica.server.transport is not None):
            if not await self._restart(replica):
                name = replica.server.config.id
                logger.warning("model %s: %s has not come back, so no other is restarted", self.config.id, name)
                return
        logger.info("model %s: every replica has been restarted", self.config.id)

    async def _restart(self, replica: Replica) -> bool:
        """Whether it is ready again; else it has failed, or was stopped meanwhile."""
        server = replica.server
        spawns = server.status.spawns
        server.request_restart()
        while server.transport is None or server.status.spawns == spawns:
            if server.phase is Phase.RESTING:
                return False
            await self._changed.wait()
        return True
