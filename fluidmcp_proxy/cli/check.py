"""``fluidmcp check``: is this configuration good, and what would it do?

It starts nothing and opens no connection. What would go wrong on this machine now is a warning: the file may be meant
for another one, or be in use.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator

import anyio
import click

from fluidmcp_proxy.config import GatewayConfig, ModelConfig, child_environment, configured_path, load_config
from fluidmcp_proxy.config.capacity import overcommitted
from fluidmcp_proxy.config.checks import check_exposure
from fluidmcp_proxy.config.endpoint import Endpoint
from fluidmcp_proxy.config.faults import printable
from fluidmcp_proxy.config.replicas import gets_a_socket
from fluidmcp_proxy.errors import ConfigError
from fluidmcp_proxy.process.listener import port_is_free

from .faults import BadConfiguration

_WIDTH = 100


@click.command()
@click.argument("config", required=False, type=click.Path())
def check(config: str | None) -> None:
    """Check CONFIG (by default the file in FLUIDMCP_CONFIG) and show what it would run.

    Warnings are about secrets in the open, servers that the network can reach, and what would fail on this machine now:
    programs that are missing, ports that are taken, GPUs without room for all that start together.

    Exit code 0: it can be used, perhaps with warnings. 2: it cannot; one line says why.
    """
    try:
        checked = load_config(config or configured_path())
        check_exposure(checked.settings)
    except ConfigError as error:
        raise BadConfiguration(error) from None
    for line in report(checked):
        click.echo(_displayable(line))


def _displayable(line: str) -> str:
    """``line`` for this terminal: nothing that it would act on, nothing that its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(line).encode(encoding, "backslashreplace").decode(encoding)


def report(config: GatewayConfig) -> Iterator[str]:
    """The lines that ``check`` prints: the gateway, each model, the warnings."""
    host, port = config.settings.host, config.settings.port
    gateway = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    count = len(config.models)
    yield f"{config.source or 'configuration'}: ok, {count} model{'' if count == 1 else 's'}"
    for model in config.models.values():
        yield f"{model.id}: {gateway}/{model.id}/v1 -> {upstream(model)}"
        yield f"  {purpose(model)}"
    for warning in (*config.warnings, *shortcomings(config)):
        yield f"warning: {warning}"


def upstream(model: ModelConfig) -> str:
    """The address at which the gateway reaches the model's server, or those of its replicas."""
    if model.endpoints:
        return ", ".join(map(_address, model.endpoints))
    kind = "Unix socket" if gets_a_socket(model) else "port"
    return f"a {kind} of the gateway's choice" if model.replicas == 1 else f"{model.replicas} {kind}s of its choice"


def _address(end: Endpoint) -> str:
    if end.uds is not None:
        return f"unix:{end.uds}"
    host = f"[{end.host}]" if ":" in end.host else end.host
    return f"{end.scheme}://{host}:{end.port}{end.root}/v1"


def purpose(model: ModelConfig) -> str:
    """What the gateway does for the model, secrets masked."""
    if model.command is None:
        return "forwards only: someone else runs the server"
    line = "starts " + shlex.join((model.command, *model.masked_args))
    return line if len(line) <= _WIDTH else line[:_WIDTH] + "..."


def shortcomings(config: GatewayConfig) -> Iterator[str]:
    """What would fail at the start on this machine, as far as it is cheap to see."""
    for model in config.models.values():
        if model.command is None:
            continue
        if shutil.which(model.command, path=child_environment(model).get("PATH", "/usr/bin:/bin")) is None:
            place = "there is no such program" if "/" in model.command else "not on PATH"
            yield f"llmModels.{model.id}.command: {place}; the model would fail until it is installed"
    yield from anyio.run(_taken_ports, config)
    yield from overcommitted(config.models.values())


async def _taken_ports(config: GatewayConfig) -> list[str]:
    """The ports that the gateway and its models need, and that somebody listens on."""
    unless = "unless that is this gateway, which is running"
    found = []
    settings = config.settings
    if settings.port and not await port_is_free(settings.host, settings.port):
        found.append(f"port {settings.port} of {settings.host} is taken; {unless}, it could not start")
    for model in config.models.values():
        end = model.endpoint
        if model.command is None or end is None or end.uds is not None:
            continue
        if not await port_is_free(end.host, end.port):
            found.append(f"llmModels.{model.id}: port {end.port} is taken; {unless}, the model would fail")
    return found
