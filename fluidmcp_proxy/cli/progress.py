"""What the models are doing while ``fluidmcp run`` starts them, and where they are: lines, and bars on a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import anyio
import click

from fluidmcp_proxy.cli.terminal import Board, bar, table
from fluidmcp_proxy.config.faults import printable
from fluidmcp_proxy.config.options import Start
from fluidmcp_proxy.errors import LifespanNotRunning
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.models.state import ModelState, ModelStatus

__all__ = ["bars", "changes", "endpoints", "report_progress", "url_of"]

_PERIOD = 0.5
# What vLLM puts in front of what it says: (EngineCore pid=42) INFO 11-24 09:51:33 [core.py:402]
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\)\s*)?([A-Z]+:?\s+)?([\d-]+ [\d:.]+ )?(\[\S+:\d+\]\s*)?")


def url_of(host: str, port: int) -> str:
    """Where a gateway that is bound to this is to be reached from this machine."""
    shown = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{shown}:{port}"


async def report_progress(gateway: Gateway, url: str, board: Board | None = None) -> None:
    """Print where the gateway is, what its models do until they are ready, and then where they are; until cancelled.

    On a terminal, a ``board`` has a bar for each model that loads; elsewhere each change is a line.
    """
    seen: dict[str, str] = {}
    is_greeted = is_settled = False
    try:
        while True:
            statuses = _statuses(gateway)
            lines: list[str] = []
            if statuses and not is_greeted:
                is_greeted = True
                lines.append(f"FluidMCP gateway on {url} (Ctrl-C ends it and its models)")
            shown = statuses if board is None else [status for status in statuses if not _loads(status)]
            lines += changes(shown, seen, url)
            if is_greeted and not is_settled and _are_settled(gateway, statuses):
                is_settled = True
                lines += endpoints(statuses, url)
            if lines and board is not None:
                board.clear()
            for line in lines:
                click.echo(line)
            if board is not None:
                board.draw(bars(statuses, time.time()))
            await anyio.sleep(_PERIOD)
    finally:
        if board is not None:
            board.clear()


def _statuses(gateway: Gateway) -> list[ModelStatus]:
    try:
        return [gateway.status(name) for name in gateway.config.models]
    except LifespanNotRunning:
        return []


def _loads(status: ModelStatus) -> bool:
    return status.state in (ModelState.STARTING, ModelState.WAKING)


def _are_settled(gateway: Gateway, statuses: list[ModelStatus]) -> bool:
    """Whether all that start with the gateway are ready, or have failed."""
    models = gateway.config.models
    eager = [status for status in statuses if models[status.id].start is Start.EAGER]
    return all(status.state in (ModelState.READY, ModelState.FAILED) for status in eager)


def endpoints(statuses: list[ModelStatus], url: str) -> Iterator[str]:
    """The lines of a table of where each model is."""
    rows = [("MODEL", "STATE", "URL")]
    rows += [(status.id, str(status.state), f"{url}/{status.id}/v1") for status in statuses]
    return table([*rows, ("(any)", "", f"{url}/v1")])


def bars(statuses: list[ModelStatus], now: float) -> list[str]:
    """A line with a bar for each model that loads."""
    loading = [status for status in statuses if _loads(status)]
    width = max((len(status.id) for status in loading), default=0)
    seconds = [max(0, now - status.since) for status in loading]
    return [
        f"  {status.id.ljust(width)} {bar(status.percent)} {since:4.0f} s  {printable(_doing(status))}"
        for status, since in zip(loading, seconds, strict=True)
    ]


def changes(statuses: list[ModelStatus], seen: dict[str, str], url: str) -> Iterator[str]:
    """The lines for what is not in ``seen`` yet, which is brought up to date."""
    for status in statuses:
        line = _line(status, url)
        if line is not None and seen.get(status.id) != line:
            seen[status.id] = line
            yield line


def _line(status: ModelStatus, url: str) -> str | None:
    if status.state is ModelState.READY:
        return f"  {status.id}: ready at {url}/{status.id}/v1"
    if status.state is ModelState.STARTING:
        # Nothing else that the server says: a bar's line passes, these stay, and most of what servers say is noise.
        return f"  {status.id}: loading" if status.stage is None else f"  {status.id}: loading: {_stage(status)}"
    return None  # stops and failures are in the log


def _stage(status: ModelStatus) -> str:
    return f"{status.stage}" if status.percent is None else f"{status.stage}, {status.percent} %"


def _doing(status: ModelStatus) -> str:
    return status.stage or _PREFIX.sub("", status.progress or "")
