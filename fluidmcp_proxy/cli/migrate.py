"""``fluidmcp migrate``: rewrite a file whose vLLM still runs behind the deprecated JSON-RPC wrapper.

The file is replaced in one step, and the old one is kept beside it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import click

from fluidmcp_proxy.config.document import read_document
from fluidmcp_proxy.config.load import located
from fluidmcp_proxy.config.migrate import Migration
from fluidmcp_proxy.config.migrate import migrate as rewrite
from fluidmcp_proxy.errors import ConfigError

from .faults import BadConfiguration


@click.command()
@click.argument("config", type=click.Path())
@click.option("--write", is_flag=True, help="Replace CONFIG; the old file is kept as CONFIG.bak.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the new file here instead of printing it.")
def migrate(config: str, write: bool, output: str | None) -> None:
    """Rewrite the deprecated vLLM wrapper in CONFIG as llmModels.

    Prints the new file, or writes it with --write or -o. Other MCP servers stay as they are.
    """
    if write and output:
        raise click.UsageError("--write and -o exclude each other.")
    try:
        migration = rewrite(read_document(config))
    except ConfigError as error:
        raise BadConfiguration(located(error, config)) from None
    target = config if write else output
    if target is None:
        click.echo(migration.text if _encodable(migration.text) else migration.ascii, nl=False)
    elif migration.changes or output:
        _write(Path(target), migration.text)
    _explain(migration)


def _encodable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _explain(migration: Migration) -> None:
    if not migration.changes:
        click.echo("nothing to migrate: no vLLM wrapper under mcpServers", err=True)
    for line in migration.changes:
        click.echo(line, err=True)
    for line in migration.advice:
        click.echo(f"warning: {line}", err=True)


def _write(target: Path, text: str) -> None:
    try:
        backup = replace_file(target, text)
    except OSError as error:
        raise click.UsageError(f"{target} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {target}" + (f", the old file is {backup}" if backup else ""), err=True)


def replace_file(target: Path, text: str) -> Path | None:
    """Put ``text`` into ``target`` in one step, with the old file's permissions, and return where the old file is kept.

    A symbolic link stays one: the file it names is replaced. Raises ``OSError``; then the old file is untouched.
    """
    file = Path(os.path.realpath(target))
    old = file.read_bytes() if file.exists() else None
    mode = stat.S_IMODE(file.stat().st_mode) if old is not None else 0o600
    backup = None if old is None else _backup(file, old, mode)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        _fill(descriptor, text.encode(), mode)
        os.replace(name, file)
    except BaseException:  # whatever it was, half a file must not stay
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return backup


def _backup(file: Path, content: bytes, mode: int) -> Path:
    number = 0
    while True:
        backup = file.with_name(f"{file.name}.bak{f'.{number}' if number else ''}")
        try:
            descriptor = os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            number += 1
            continue
        _fill(descriptor, content, mode)
        return backup


def _fill(descriptor: int, content: bytes, mode: int) -> None:
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
