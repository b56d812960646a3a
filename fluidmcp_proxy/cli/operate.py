"""``fluidmcp status``, ``logs``, ``start``, ``stop`` and ``restart``: a gateway that runs already."""

from __future__ import annotations

import codecs
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import anyio
import click

from fluidmcp_proxy.cli.remote import Remote, connected
from fluidmcp_proxy.cli.terminal import table
from fluidmcp_proxy.config.faults import printable

__all__ = ["COMMANDS"]

_CONFIG = click.option(
    "--config", type=click.Path(), metavar="FILE", help="The gateway that runs FILE; needed if you run several."
)
_URL = click.option(
    "--url", help="A gateway by its URL instead; its key is taken from the variable FLUIDMCP_CLIENT_KEY."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_HEAD = ("MODEL", "STATE", "FOR", "PID", "RESTARTS", "IN FLIGHT", "QUEUED", "")
_WIDTH = 80

_Work = Callable[[Remote], Awaitable[None]]


@click.command()
@_JSON
@_CONFIG
@_URL
def status(as_json: bool, config: str | None, url: str | None) -> None:
    """Show what the models of a running gateway do."""
    _with(config, url, partial(_show_status, as_json=as_json))


@click.command()
@click.argument("model")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed from now on.")
@click.option("-n", "--lines", type=click.IntRange(0, 1000), default=100, show_default=True, help="How many lines.")
@_CONFIG
@_URL
def logs(model: str, follow: bool, lines: int, config: str | None, url: str | None) -> None:
    """Show what the server of MODEL has printed last."""
    _with(config, url, partial(_show_logs, model=model, follow=follow, lines=lines))


def _action(verb: str, text: str) -> click.Command:
    @click.command(verb, help=text)
    @click.argument("model")
    @_JSON
    @_CONFIG
    @_URL
    def command(model: str, as_json: bool, config: str | None, url: str | None) -> None:
        _with(config, url, partial(_act, model=model, verb=verb, as_json=as_json))

    return command


start = _action("start", "Start MODEL, also one that has failed. Returns while it loads; `status` shows how far it is.")
stop = _action("stop", "Stop MODEL, drained first, until it is started; requests to it are refused.")
restart = _action("restart", "Stop MODEL, drained first, and start it anew; replicas one after the other.")


@click.command("reload")
@_JSON
@_CONFIG
def read_again(as_json: bool, config: str | None) -> None:
    """Have a running gateway read its file again and apply what is another.

    Models that did not change go on without a pause. A file that cannot be used changes nothing.
    """
    _with(config, None, partial(_reload, as_json=as_json))


COMMANDS = (status, logs, start, stop, restart, read_again)


def _with(config: str | None, url: str | None, work: _Work) -> None:
    if config is not None and url is not None:
        raise click.UsageError("--config and --url exclude each other.")

    async def main() -> None:
        async with connected(config, url) as remote:
            await work(remote)

    try:
        anyio.run(main)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


async def _show_status(remote: Remote, *, as_json: bool) -> None:
    models = await remote.models()
    if as_json:
        click.echo(json.dumps({"models": models}, indent=2))
    else:
        for line in table([_HEAD, *(_row(model, time.time()) for model in models)]):
            click.echo(line)


async def _act(remote: Remote, *, model: str, verb: str, as_json: bool) -> None:
    answer = await remote.ask("POST", f"/models/{quote(model, safe='')}/{verb}")
    click.echo(json.dumps(answer, indent=2) if as_json else f"{printable(answer['id'])}: {verb} asked for")


async def _reload(remote: Remote, *, as_json: bool) -> None:
    answer = await remote.ask("POST", "/reload")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    found = [f"{word}: {', '.join(answer[word])}" for word in ("added", "changed", "removed") if answer[word]]
    click.echo(printable("; ".join(found) or "no model has changed"))
    if answer["needs_restart"]:
        click.echo(printable(f"unchanged until a restart: {', '.join(answer['needs_restart'])}"), err=True)


async def _show_logs(remote: Remote, *, model: str, follow: bool, lines: int) -> None:
    path = f"/models/{quote(model, safe='')}/logs?lines={lines}&follow={'true' if follow else 'false'}"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    async with remote.stream("GET", path) as answer:
        async for chunk in answer.body:
            *complete, rest = (rest + decoder.decode(chunk)).split("\n")
            for line in complete:
                click.echo(printable(line.expandtabs()))
    if rest:
        click.echo(printable(rest.expandtabs()))


def _row(model: Mapping[str, Any], now: float) -> Sequence[str]:
    cells = [model["id"], model["state"], _span(now - model["since"]), model["pid"] or "-"]
    cells += [model["restarts"], model["in_flight"], model["queued"], _doing(model)]
    return [printable(str(cell)) for cell in cells]


def _doing(model: Mapping[str, Any]) -> str:
    """What it loads, or why it does not run."""
    if model["state"] == "starting":
        doing = str(model["stage"] or model["progress"] or "")
        return doing[:_WIDTH] + (f", {model['percent']} %" if model["percent"] is not None else "")
    return str(model["message"] or "").partition("\n")[0][:_WIDTH]


def _span(seconds: float) -> str:
    """``42 s``, ``5 min``, ``3 h`` or ``2 d``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
