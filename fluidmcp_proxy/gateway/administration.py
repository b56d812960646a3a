"""What administrators do with models: start, stop and restart them, and read what their servers print.

Whether somebody is one has been found out before.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Protocol

import anyio

from fluidmcp_proxy.errors import InvalidTarget, ModelNotManaged, ShuttingDown
from fluidmcp_proxy.gateway.answers import Receive, Send
from fluidmcp_proxy.gateway.departure import race_departure
from fluidmcp_proxy.gateway.routes import Verb
from fluidmcp_proxy.models.fleet import Fleet
from fluidmcp_proxy.process.output import MAX_LINES, Output

__all__ = ["act", "send_logs"]

logger = logging.getLogger("fluidmcp_proxy.gateway")

_LINES = 100
_PERIOD = 0.2
"""Seconds between two looks at what is new, so that a flood leaves in large pieces."""
_NUMBER = re.compile(r"[0-9]{1,6}").fullmatch


class _Asked(Protocol):
    """The ASGI side of a request."""

    receive: Receive
    send: Send
    id: bytes


def act(fleet: Fleet, model: str, verb: Verb, who: str) -> None:
    """Ask for ``verb``; it takes effect after this has returned. ``who`` is the name of a key, for the log.

    Raises:
        ModelNotManaged: somebody else runs the model's server.
        ShuttingDown: the gateway is ending.
    """
    if fleet.servers[model].config.command is None:
        raise _not_managed(model)
    if fleet.closing:
        raise ShuttingDown("The gateway is shutting down.", retry_after=5)
    logger.info("model %s: %s asked for by %s", model, verb, who)
    ask = {Verb.START: fleet.scheduler.start, Verb.STOP: fleet.scheduler.stop, Verb.RESTART: fleet.scheduler.restart}
    ask[verb](model)


async def send_logs(fleet: Fleet, model: str, query: bytes, method: str, request: _Asked) -> None:
    """Answer with the last lines that the servers of ``model`` have printed, and go on with ``?follow=true``.

    Following ends when the client leaves, or with the gateway.

    Raises:
        InvalidTarget: the query cannot be understood.
        ModelNotManaged: somebody else runs the model's server.
    """
    lines, follows = _understood(query)
    outputs = fleet.outputs[model]
    if not outputs:
        raise _not_managed(model)
    tail = _finished if follows else Output.tail
    shown = [line for name, output in outputs.items() for line in _named(name, tail(output, lines), outputs)]
    seen = {name: output.count for name, output in outputs.items()}
    fields = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would collect what it is sent
        (b"x-content-type-options", b"nosniff"),
        (b"x-request-id", request.id),
    ]
    await request.send({"type": "http.response.start", "status": 200, "headers": fields})
    if follows and method != "HEAD":
        await request.send({"type": "http.response.body", "body": _text(shown), "more_body": True})
        async with race_departure(lambda: _left(request.receive)):
            await _follow(fleet, outputs, seen, request.send)
        shown = []
    await request.send({"type": "http.response.body", "body": b"" if method == "HEAD" else _text(shown)})


async def _follow(fleet: Fleet, outputs: Mapping[str, Output], seen: dict[str, int], send: Send) -> None:
    def is_over() -> bool:
        return fleet.closing or outputs not in fleet.outputs.values()  # another configuration has replaced the model

    while not is_over():
        await anyio.sleep(_PERIOD)
        fresh: list[str] = []
        for name, output in outputs.items():
            fresh += _named(name, output.since(seen[name]), outputs)
            seen[name] = output.count
        if fresh:
            await send({"type": "http.response.body", "body": _text(fresh), "more_body": True})


def _finished(output: Output, lines: int) -> list[str]:
    """The last ``lines`` without the one that is being written, which comes when it is complete."""
    return output.since(output.count - lines)


def _named(name: str, lines: list[str], outputs: Mapping[str, Output]) -> Iterator[str]:
    """The lines, with the replica that printed them where there are several."""
    return (f"{name} | {line}" if len(outputs) > 1 else line for line in lines)


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _understood(query: bytes) -> tuple[int, bool]:
    """``lines`` and ``follow``; anything else in a query is not for us."""
    asked = dict(pair.partition("=")[::2] for pair in query.decode("latin-1").split("&"))
    lines, follow = asked.get("lines", str(_LINES)), asked.get("follow", "false")
    if not _NUMBER(lines) or follow not in ("true", "false"):
        raise InvalidTarget("lines has to be a number, and follow true or false.", param="lines")
    return min(int(lines), MAX_LINES), follow == "true"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _not_managed(model: str) -> ModelNotManaged:
    return ModelNotManaged(f"The server of LLM model '{model}' is not run by this gateway.")
