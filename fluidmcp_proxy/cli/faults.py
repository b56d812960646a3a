"""How a command ends when the configuration cannot be used: one line on stderr, exit code 2."""

from __future__ import annotations

from typing import IO, Any

import click

from fluidmcp_proxy.errors import ConfigError


class BadConfiguration(click.ClickException):
    """A ``ConfigError`` on its way out of a command."""

    exit_code = 2

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line as it is: it begins with its code."""
        click.echo(self.message, file=file, err=file is None)
