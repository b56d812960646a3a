"""All models of one gateway: takes ownership of the configuration, runs every server, ends them together.

The servers live in one task group; a supervisor contains its own failures,
so that one model never disturbs another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import anyio

from fluidmcp_proxy.config.models import GatewayConfig, ModelConfig, Start
from fluidmcp_proxy.config.replicas import replicas_of
from fluidmcp_proxy.config.settings import Settings, child_environment, server_keep_alive
from fluidmcp_proxy.errors import ungrouped
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.catalog import Catalog
from fluidmcp_proxy.models.desk import shares_a_slot
from fluidmcp_proxy.models.launcher import ProcessLauncher
from fluidmcp_proxy.models.liveness import until_stalled
from fluidmcp_proxy.models.pool import Pool, Replica
from fluidmcp_proxy.models.remote import RemoteServer
from fluidmcp_proxy.models.replicas import ReplicaSet
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.sleep import SleepMode
from fluidmcp_proxy.models.supervisor import Supervisor
from fluidmcp_proxy.process.gpu import GpuMemory, find_reader
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import Ownership, own
from fluidmcp_proxy.upstream.client import Address, Timeouts, Transport, open_transport

__all__ = ["Fleet", "open_fleet"]

_IDLE_LIMIT = 60.0
"""Seconds that an idle connection is kept to a server that keeps it for longer."""


class Fleet:
    """The running models: ``servers`` by id, the ``scheduler`` that gives leases on them, the ``catalog`` of names.

    ``outputs`` is what the servers of each model print that are started here, by the ids of its replicas.
    """

    def __init__(
        self, servers: Mapping[str, Server], scheduler: Scheduler, outputs: Mapping[str, Mapping[str, Output]]
    ) -> None:
        self.servers = MappingProxyType(dict(servers))
        self.outputs = MappingProxyType(dict(outputs))
        self.scheduler = scheduler
        self.catalog = Catalog(self.servers)
        self.closing = False

    def close(self) -> None:
        """Have every model drained and stopped; requests that wait for one are refused from now on."""
        self.closing = True
        self.scheduler.close()
        self.catalog.close()
        for server in self.servers.values():
            server.close()


@asynccontextmanager
async def open_fleet(config: GatewayConfig) -> AsyncIterator[Fleet]:
    """Start the eager models and yield at once, while they load; leaving ends them all, drained first.

    Raises:
        AlreadyOwned: another gateway runs this configuration.
    """
    async with AsyncExitStack() as stack:
        owner = await _take_ownership(config, stack)
        scheduler = Scheduler()
        outputs = {name: _outputs(model, config.settings) for name, model in config.models.items()}
        servers = {
            name: _server(model, config.settings, scheduler, owner, outputs[name])
            for name, model in config.models.items()
        }
        for server in servers.values():
            scheduler.admit(server)
        fleet = Fleet(servers, scheduler, outputs)
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(scheduler.run)
                for name, server in servers.items():
                    tasks.start_soon(server.run)
                    if server.config.start is Start.EAGER:
                        scheduler.start(name)
                tasks.start_soon(fleet.catalog.watch)
                try:
                    yield fleet
                finally:
                    fleet.close()


async def _take_ownership(config: GatewayConfig, stack: AsyncExitStack) -> Ownership | None:
    """None when nothing is launched, hence nothing owned."""
    launched = [model for model in config.models.values() if model.command is not None]
    if not launched:
        return None
    patience = max(model.stop_timeout for model in launched) + 2
    return await stack.enter_async_context(own(config.identity, config.settings.runtime_dir, patience))


def _outputs(model: ModelConfig, settings: Settings) -> Mapping[str, Output]:
    if model.command is None:
        return {}
    names = [copy.id for copy in replicas_of(model)]
    return {name: Output(settings.log_dir / f"{name}.log", secrets=model.secrets) for name in names}


def _server(
    model: ModelConfig,
    settings: Settings,
    scheduler: Scheduler,
    owner: Ownership | None,
    outputs: Mapping[str, Output],
) -> Server:
    copies = replicas_of(model)
    if len(copies) > 1:
        return _replica_set(model, copies, settings, owner, outputs)
    watch = _Watch(
        connect=partial(_connect, model),
        drain=partial(scheduler.drain, model.id, settings.drain_timeout),
        unanswered=partial(scheduler.unanswered, model.id),
        progress=partial(scheduler.progress, model.id),
    )
    return _one(copies[0], watch, settings, owner, outputs)


def _replica_set(
    model: ModelConfig,
    copies: Sequence[ModelConfig],
    settings: Settings,
    owner: Ownership | None,
    outputs: Mapping[str, Output],
) -> ReplicaSet:
    replicas = [Replica(address_of(copy)) for copy in copies]
    pool = Pool(model, replicas)
    for copy, replica in zip(copies, replicas, strict=True):
        watch = _watch_replica(copy, replica, pool, settings.drain_timeout)
        replica.server = _one(copy, watch, settings, owner, outputs)
    return ReplicaSet(model, replicas, pool)


def _watch_replica(model: ModelConfig, replica: Replica, pool: Pool, drain_timeout: float) -> _Watch:
    def connect(address: Address) -> Transport:
        pool.begin(replica, address)
        return _connect(model, address)

    return _Watch(
        connect=connect,
        drain=partial(replica.drain, drain_timeout),
        unanswered=lambda: replica.unanswered,
        progress=lambda: replica.progress,
    )


class _Watch(NamedTuple):
    """How a server is connected to, and what is known of the requests inside it."""

    connect: Callable[[Address], Transport]
    drain: Callable[[], Awaitable[None]]
    unanswered: Callable[[], int]
    progress: Callable[[], int]


def _one(
    model: ModelConfig, watch: _Watch, settings: Settings, owner: Ownership | None, outputs: Mapping[str, Output]
) -> Supervisor | RemoteServer:
    if model.command is None:
        return RemoteServer(model, address_of(model), watch.connect(address_of(model)), drain=watch.drain)
    stalled = partial(
        until_stalled,
        address=address_of(model),
        in_flight=watch.unanswered,
        progress=watch.progress,
        stall_timeout=model.stall_timeout,
    )
    memory = None
    if shares_a_slot(model) and (reader := find_reader()) is not None:
        memory = GpuMemory(reader, child_environment(model).get("CUDA_VISIBLE_DEVICES"))
    launcher = ProcessLauncher(model, outputs[model.id], owner, settings.runtime_dir)
    return Supervisor(
        model,
        launcher,
        connect=watch.connect,
        drain=watch.drain,
        until_stalled=stalled if model.liveness else None,
        sleep=None if model.sleep is None else SleepMode(address_of(model), model.sleep),
        memory=memory,
    )


def _connect(model: ModelConfig, address: Address) -> Transport:
    timeouts = Timeouts(model.connect_timeout, model.first_byte_timeout, model.stream_idle_timeout)
    kept = server_keep_alive(model)
    if kept is None:
        return open_transport(address, timeouts)
    return open_transport(address, timeouts, keep_alive=min(_IDLE_LIMIT, kept - 1))  # a second for what is under way
