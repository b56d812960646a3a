"""All models of one gateway: takes ownership of the configuration, runs every server, ends them together.

The servers live in one task group; a supervisor contains its own failures, so that one model never disturbs another. A
configuration is applied in one synchronous step, the first one as each later one: what is the same is left alone, the
rest leaves, and what is new is started when that is gone, since it may need its port, its GPU or its place in a group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup

from fluidmcp_proxy.config.models import GatewayConfig, ModelConfig
from fluidmcp_proxy.config.options import Start
from fluidmcp_proxy.errors import FluidMCPError, ungrouped
from fluidmcp_proxy.models.assembly import outputs_of, server_of
from fluidmcp_proxy.models.catalog import Catalog
from fluidmcp_proxy.models.desk import Desk, Inside
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import Ownership, own

__all__ = ["Fleet", "open_fleet"]


class _Member(NamedTuple):
    """A model's server with all that goes with it; ``gone`` is set when it holds nothing any more."""

    model: ModelConfig
    server: Server
    outputs: Mapping[str, Output]
    desk: Desk
    gone: anyio.Event


class Fleet:
    """The running models: ``servers`` by id, the ``scheduler`` that gives leases on them, the ``catalog`` of names.

    ``outputs`` is what the servers of each model print that are started here, by the ids of its replicas. All but the
    scheduler are replaced as wholes when another configuration is applied.
    """

    servers: Mapping[str, Server]
    outputs: Mapping[str, Mapping[str, Output]]

    def __init__(self, scheduler: Scheduler, owner: Ownership | None, tasks: TaskGroup) -> None:
        self.scheduler = scheduler
        self.catalog = Catalog({})
        self.closing = False
        self._owner = owner
        self._tasks = tasks
        self._members: dict[str, _Member] = {}
        self._leaving: set[anyio.Event] = set()

    def apply(self, config: GatewayConfig) -> None:
        """Have the models of ``config``, and start those that are new and eager.

        Raises:
            FluidMCPError: it launches programs, and this gateway does not own its configuration. Nothing has happened.
        """
        if self._owner is None and _launched(config):
            raise FluidMCPError(
                "the gateway was started without a model that it launches, so it is not the one owner of its"
                " configuration, which it has to be to launch any; restart it"
            )
        kept = {name for name, member in self._members.items() if config.models.get(name) == member.model}
        for name in self._members.keys() - kept:
            self._retire(self._members.pop(name))
        fresh = {name: model for name, model in config.models.items() if name not in kept}
        self._members |= {name: self._admit(model, config) for name, model in fresh.items()}
        self._members = {name: self._members[name] for name in config.models}
        self._publish(kept)
        for name, model in fresh.items():
            if model.start is Start.EAGER:
                self.scheduler.start(name)

    def close(self) -> None:
        """Have every model drained and stopped; requests that wait for one are refused from now on."""
        self.closing = True
        self.scheduler.close()
        self.catalog.close()
        for server in self.servers.values():
            server.close()

    def _admit(self, model: ModelConfig, config: GatewayConfig) -> _Member:
        outputs, inside = outputs_of(model, config.settings), Inside()
        server = server_of(model, config.settings, self._owner, outputs, inside)
        inside.desk = self.scheduler.admit(server)
        member = _Member(model, server, outputs, inside.desk, anyio.Event())
        self._tasks.start_soon(self._run, member, tuple(self._leaving) if model.command is not None else ())
        return member

    def _retire(self, member: _Member) -> None:
        self.scheduler.retire(member.model.id)
        member.server.close()
        self._leaving.add(member.gone)

    async def _run(self, member: _Member, before: Collection[anyio.Event]) -> None:
        for gone in before:
            await gone.wait()
        await member.server.run()
        member.gone.set()
        self._leaving.discard(member.gone)
        if member.desk.retired:
            self.scheduler.forget(member.desk)

    def _publish(self, kept: Collection[str]) -> None:
        self.servers = MappingProxyType({name: member.server for name, member in self._members.items()})
        self.outputs = MappingProxyType({name: member.outputs for name, member in self._members.items()})
        self.scheduler.arrange(self._members)
        self.catalog.close()
        self.catalog = Catalog(self.servers, known=self.catalog, kept=kept)
        self._tasks.start_soon(self.catalog.watch)


@asynccontextmanager
async def open_fleet(config: GatewayConfig) -> AsyncIterator[Fleet]:
    """Start the eager models and yield at once, while they load; leaving ends them all, drained first.

    Raises:
        AlreadyOwned: another gateway runs this configuration.
    """
    async with AsyncExitStack() as stack:
        owner = await _take_ownership(config, stack)
        scheduler = Scheduler()
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(scheduler.run)
                fleet = Fleet(scheduler, owner, tasks)
                fleet.apply(config)
                try:
                    yield fleet
                finally:
                    fleet.close()


def _launched(config: GatewayConfig) -> list[ModelConfig]:
    return [model for model in config.models.values() if model.command is not None]


async def _take_ownership(config: GatewayConfig, stack: AsyncExitStack) -> Ownership | None:
    """None when nothing is launched, hence nothing owned."""
    launched = _launched(config)
    if not launched:
        return None
    patience = max(model.stop_timeout for model in launched) + 2
    return await stack.enter_async_context(own(config.identity, config.settings.runtime_dir, patience))
