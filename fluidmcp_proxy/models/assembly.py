"""How the server of one model is put together from what the rooms below have.

It starts nothing, and knows no other model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from fluidmcp_proxy.config.inheritance import child_environment, server_keep_alive
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.replicas import replicas_of
from fluidmcp_proxy.config.settings import Settings
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.desk import Inside, shares_a_slot
from fluidmcp_proxy.models.launcher import ProcessLauncher
from fluidmcp_proxy.models.liveness import until_stalled
from fluidmcp_proxy.models.pool import Pool, Replica
from fluidmcp_proxy.models.remote import RemoteServer
from fluidmcp_proxy.models.replicas import ReplicaSet
from fluidmcp_proxy.models.scheduler import drain
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.sleep import SleepMode
from fluidmcp_proxy.models.supervisor import Supervisor
from fluidmcp_proxy.process.gpu import GpuMemory, find_reader
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import Ownership
from fluidmcp_proxy.upstream.client import Address, Timeouts, Transport, open_transport

__all__ = ["outputs_of", "server_of"]

_IDLE_LIMIT = 60.0
"""Seconds that an idle connection is kept to a server that keeps it for longer."""


def outputs_of(model: ModelConfig, settings: Settings) -> Mapping[str, Output]:
    """What the model's servers are going to print, by the ids of its replicas; empty where none is started here."""
    if model.command is None:
        return {}
    names = [copy.id for copy in replicas_of(model)]
    return {name: Output(settings.log_dir / f"{name}.log", secrets=model.secrets) for name in names}


def server_of(
    model: ModelConfig, settings: Settings, owner: Ownership | None, outputs: Mapping[str, Output], inside: Inside
) -> Server:
    """The model's server, which does nothing before its ``run()``."""
    copies = replicas_of(model)
    if len(copies) > 1:
        return _replica_set(model, copies, settings, owner, outputs)
    watch = _Watch(
        connect=partial(_connect, model),
        drain=lambda: drain(inside.desk, settings.drain_timeout),
        unanswered=inside.unanswered,
        progress=inside.progress,
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
