"""``fluidmcp schema``: the JSON Schema of the configuration file, for editors."""

from __future__ import annotations

import json

import click

from fluidmcp_proxy.config.schema import json_schema


@click.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file (draft 2020-12).

    Name the result in the file's "$schema" key, and an editor completes and checks it.
    """
    click.echo(json.dumps(json_schema(), indent=2))
