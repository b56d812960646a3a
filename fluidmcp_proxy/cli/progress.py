"""What the models are doing, line by line, while ``fluidmcp run`` starts them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import anyio
import click

from fluidmcp_proxy.errors import LifespanNotRunning
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.models.state import ModelState, ModelStatus

__all__ = ["report_progress", "url_of"]

_PERIOD = 0.5
_WIDTH = 110
# What vLLM puts in front of what it says: (EngineCore pid=42) INFO 11-24 09:51:33 [core.py:402]
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\)\s*)?([A-Z]+:?\s+)?([\d-]+ [\d:.]+ )?(\[\S+:\d+\]\s*)?")


def url_of(host: str, port: int) -> str:
    """Where a gateway that is bound to this is to be reached from this machine."""
    shown = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{shown}:{port}"


async def report_progress(gateway: Gateway, url: str) -> None:
    """Print where the gateway is, then each change of a loading model, until cancelled."""
    seen: dict[str, str] = {}
    greeted = False
    while True:
        try:
            statuses = [gateway.status(name) for name in gateway.config.models]
        except LifespanNotRunning:
            statuses = []
        if statuses and not greeted:
            greeted = True
            click.echo(f"FluidMCP gateway on {url} (Ctrl-C ends it and its models)")
        for line in changes(statuses, seen, url):
            click.echo(line)
        await anyio.sleep(_PERIOD)


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
        doing = _PREFIX.sub("", status.progress or "") if status.stage is None else _stage(status)
        return f"  {status.id}: loading{': ' if doing else ''}{doing}"[:_WIDTH]
    return None  # stops and failures are in the log


def _stage(status: ModelStatus) -> str:
    return f"{status.stage}" if status.percent is None else f"{status.stage}, {status.percent} %"
