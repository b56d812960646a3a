"""A model's server as a tree of processes on this machine: what the supervisor's ``Launcher`` is today.

The one place where ``process/`` and a model's configuration meet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.settings import child_environment
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.supervisor import CannotStart
from fluidmcp_proxy.process.group import CommandError, NoProcess, ProcessGroup, open_process_group
from fluidmcp_proxy.process.listener import can_verify, port_is_free, resolve, verified_address
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import Ownership
from fluidmcp_proxy.upstream.client import Address

__all__ = ["ProcessLauncher"]


class ProcessLauncher:
    """Starts the ``command`` of a model, each time into a new process group with ``output`` as its terminal."""

    def __init__(self, model: ModelConfig, output: Output, owner: Ownership | None) -> None:
        self._model = model
        self._output = output
        self._owner = owner

    def tail(self, lines: int) -> list[str]:
        """The last lines of the last launch's output, secrets redacted."""
        return self._output.tail(lines, of_this_launch=True)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[_Process]:
        """The running server; leaving the scope ends its whole tree.

        Raises:
            CannotStart: ``command_invalid`` for a command that cannot be run, ``port_in_use``, ``no_process``.
        """
        model = self._model
        await self._refuse_taken_port()
        assert model.command is not None
        self._output.begin()
        try:
            group = open_process_group(
                [model.command, *model.args],
                env=child_environment(model),
                stop_timeout=model.stop_timeout,
                output=self._output,
                owner=self._owner,
            )
            async with group as process:
                yield _Process(model, process)
        except CommandError as exc:
            raise CannotStart("command_invalid", str(exc)) from exc
        except NoProcess as exc:
            raise CannotStart("no_process", str(exc), final=False) from exc

    async def _refuse_taken_port(self) -> None:
        configured = address_of(self._model)
        if not await port_is_free(configured.host, configured.port):
            raise _port_in_use(self._model)


class _Process:
    """The supervisor's ``Child`` over a process group."""

    def __init__(self, model: ModelConfig, group: ProcessGroup) -> None:
        self._model = model
        self._group = group

    @property
    def pid(self) -> int | None:
        return self._group.pid

    async def wait(self) -> str:
        return str(await self._group.wait())

    async def listening(self) -> Address | None:
        """The configured address once this tree listens there, a name replaced by the address that was verified."""
        configured = address_of(self._model)
        if not (self._model.verify_listener and can_verify()):
            taken = not await port_is_free(configured.host, configured.port)
            return configured if taken else None
        addresses = await resolve(configured.host)
        host, is_strangers = verified_address(configured.port, addresses, self._group.pids())
        if is_strangers:
            raise _port_in_use(self._model)
        return None if host is None else replace(configured, host=host)


def _port_in_use(model: ModelConfig) -> CannotStart:
    configured = address_of(model)
    return CannotStart(
        "port_in_use",
        f"port {configured.port} ({configured.host}) is taken by a process that is not this model's; "
        "stop that one, or choose another --port and base_url",
    )
