"""A model's server as a tree of processes on this machine: what the supervisor's ``Launcher`` is today.

The one place where ``process/`` and a model's configuration meet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from fluidmcp_proxy.config.arguments import read_arguments
from fluidmcp_proxy.config.endpoint import local_endpoint
from fluidmcp_proxy.config.inheritance import child_environment
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.replicas import gets_a_socket
from fluidmcp_proxy.errors import FluidMCPError
from fluidmcp_proxy.models.address import CHOSEN, address_of
from fluidmcp_proxy.models.child import CannotStart
from fluidmcp_proxy.process import unix_socket
from fluidmcp_proxy.process.group import CommandError, NoProcess, ProcessGroup, open_process_group
from fluidmcp_proxy.process.listener import can_verify, free_port, port_is_free, resolve, verified_address
from fluidmcp_proxy.process.output import Output
from fluidmcp_proxy.process.owner import Ownership
from fluidmcp_proxy.upstream.client import Address

__all__ = ["ProcessLauncher"]


class ProcessLauncher:
    """Starts the ``command`` of a model, each time into a new process group with ``output`` as its terminal.

    Where the configuration has no address, the server is told one, new each time: a Unix socket below ``runtime_dir``,
    or a port.
    """

    def __init__(self, model: ModelConfig, output: Output, owner: Ownership | None, runtime_dir: Path) -> None:
        self._model = model
        self._output = output
        self._owner = owner
        self._runtime_dir = runtime_dir

    def tail(self, lines: int) -> list[str]:
        """The last lines of the last launch's output, secrets redacted."""
        return self._output.tail(lines, of_this_launch=True)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[_Process]:
        """The running server; leaving the scope ends its whole tree.

        Raises:
            CannotStart: ``command_invalid`` for a command that cannot be run, ``port_in_use``, ``no_process``,
                ``no_socket``, ``no_port``.
        """
        model = self._model
        assert model.command is not None
        async with self._address() as address:
            arguments = [*model.args, *self._told(address)]
            self._output.begin()
            try:
                group = open_process_group(
                    [model.command, *arguments],
                    env=child_environment(model),
                    stop_timeout=model.stop_timeout,
                    output=self._output,
                    owner=self._owner,
                )
                async with group as process:
                    yield _Process(model, process, address)
            except CommandError as exc:
                raise CannotStart("command_invalid", str(exc)) from exc
            except NoProcess as exc:
                raise CannotStart("no_process", str(exc), final=False) from exc

    @asynccontextmanager
    async def _address(self) -> AsyncIterator[Address]:
        """Where this launch is to listen, nobody being there. A server leaves its socket's file: it is removed here."""
        address = address_of(self._model)
        if address is CHOSEN:
            address = self._choose()
        await self._refuse_taken(address)
        try:
            yield address
        finally:
            if address.uds is not None and unix_socket.is_free(address.uds):
                unix_socket.remove(address.uds)

    async def _refuse_taken(self, address: Address) -> None:
        if address.uds is None:
            is_free = await port_is_free(address.host, address.port)
        elif is_free := unix_socket.is_free(address.uds):
            unix_socket.remove(address.uds)
        if not is_free:
            raise _port_in_use(self._model, address)

    def _choose(self) -> Address:
        key = self._owner.key if self._owner else ""
        try:
            if gets_a_socket(self._model):
                return replace(CHOSEN, uds=unix_socket.private_path(self._runtime_dir, f"{key} {self._model.id}"))
            return self._free_address()
        except FluidMCPError as exc:
            raise CannotStart("no_socket", str(exc), final=False) from exc
        except OSError as exc:
            raise CannotStart("no_port", f"no port can be had: {exc.strerror}", final=False) from exc

    def _free_address(self) -> Address:
        option = read_arguments(self._model.command or "", self._model.args).host
        host = local_endpoint(option.value if option else None, 1).host
        return Address("http", host, free_port(host))

    def _told(self, address: Address) -> list[str]:
        """The arguments that tell the server an address that was chosen."""
        if self._model.endpoints:
            return []
        return ["--port", str(address.port)] if address.uds is None else ["--uds", address.uds]


class _Process:
    """The supervisor's ``Child`` over a process group."""

    def __init__(self, model: ModelConfig, group: ProcessGroup, address: Address) -> None:
        self.address = address
        self._model = model
        self._is_verifiable = model.verify_listener and can_verify()
        self._group = group
        self._saw_a_stranger = False

    @property
    def pid(self) -> int | None:
        return self._group.pid

    async def wait(self) -> str:
        return str(await self._group.wait())

    async def listening(self) -> Address | None:
        """The address once this tree listens there, a name replaced by the address that was verified."""
        address = self.address
        if address.uds is not None:
            return self._listening_on_socket(address.uds)
        if not self._is_verifiable:
            taken = not await port_is_free(address.host, address.port)
            return address if taken else None
        addresses = await resolve(address.host)
        host, is_strangers = verified_address(address.port, addresses, self._group.pids())
        self._refuse(is_strangers)
        return None if host is None else replace(address, host=host)

    def _listening_on_socket(self, path: str) -> Address | None:
        if not self._is_verifiable:
            return None if unix_socket.is_free(path) else self.address
        is_ours, is_strangers = unix_socket.verified(path, self._group.pids())
        self._refuse(is_strangers)
        return self.address if is_ours else None

    def _refuse(self, is_strangers: bool) -> None:
        """A stranger is believed at the second look in a row.

        The tree and the listeners are not read in one moment, so the first may lack a process that listens in the
        second; and a list of children, some of which end meanwhile, may lack others (proc_pid_task(5)).
        """
        if is_strangers and self._saw_a_stranger:
            raise _port_in_use(self._model, self.address)
        self._saw_a_stranger = is_strangers


def _port_in_use(model: ModelConfig, address: Address) -> CannotStart:
    if address.uds is not None:
        place, remedy = f"socket {address.uds}", "choose another --uds"
    else:
        place, remedy = f"port {address.port} ({address.host})", "choose another --port and base_url"
    problem = f"{place} is taken by a process that is not this model's; stop that one, or {remedy}"
    return CannotStart("port_in_use", problem, final=bool(model.endpoints))  # the next one that is chosen may be free
