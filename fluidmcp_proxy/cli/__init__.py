"""The command line: the doors to the gateway for people at a terminal."""

from __future__ import annotations

import click

from fluidmcp_proxy.cli.check import check
from fluidmcp_proxy.cli.migrate import migrate
from fluidmcp_proxy.cli.operate import COMMANDS
from fluidmcp_proxy.cli.run import run
from fluidmcp_proxy.cli.schema import schema

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fluidmcp-proxy", prog_name="fluidmcp")
def main() -> None:
    """Run language models behind one OpenAI-compatible gateway, from a FluidMCP configuration."""


for _command in (run, *COMMANDS, check, migrate, schema):
    main.add_command(_command)
