"""A running gateway as the command line sees it: found by its control socket, or named by a URL."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import click

from fluidmcp_proxy.cli.control import CONFIGURATION
from fluidmcp_proxy.cli.faults import BadConfiguration
from fluidmcp_proxy.config.endpoint import parse_base_url
from fluidmcp_proxy.config.faults import printable
from fluidmcp_proxy.config.load import load_config
from fluidmcp_proxy.config.settings import CLIENT_KEY, client_key, read_settings
from fluidmcp_proxy.errors import ConfigError, FluidMCPError
from fluidmcp_proxy.process.control_socket import control_sockets
from fluidmcp_proxy.upstream.client import Address, Response, Timeouts, Transport, open_transport

__all__ = ["NoGateway", "Remote", "connected"]

_CONNECT = 5.0
_KEYS = frozenset(
    {"id", "state", "since", "pid", "restarts", "in_flight", "queued", "message", "stage", "progress", "percent"}
)
_MOST = 16 * 1024 * 1024


class NoGateway(click.ClickException):
    """There is none to talk to."""

    exit_code = 3


class _Unusable(click.ClickException):
    """The gateway cannot use its file."""

    exit_code = 2


class Remote:
    """One gateway, over ``transport``."""

    def __init__(self, address: Address, key: str | None = None) -> None:
        self._root = address.root
        self._transport: Transport = open_transport(address, Timeouts(connect=_CONNECT))
        self._headers = [(b"host", address.authority), (b"user-agent", b"fluidmcp")]
        if key is not None:
            self._headers.append((b"authorization", b"Bearer " + key.encode()))

    async def models(self) -> list[dict[str, Any]]:
        """The models' states. Raises as ``stream`` does."""
        answer = await self.ask("GET", "/models")
        models = answer.get("models") if isinstance(answer, dict) else None
        if not isinstance(models, list) or not all(
            isinstance(model, dict) and model.keys() >= _KEYS for model in models
        ):
            raise NoGateway("what answers is no gateway")
        return models

    async def ask(self, method: str, path: str) -> Any:
        """The JSON of an answer. Raises as ``stream`` does."""
        async with self.stream(method, path) as answer:
            return json.loads(await _whole(answer))

    @asynccontextmanager
    async def stream(self, method: str, path: str) -> AsyncIterator[Response]:
        """A good answer, as it comes.

        Raises:
            NoGateway: nobody answers, or somebody who is no gateway.
            click.ClickException: the gateway refuses, and says why.
        """
        headers = [*self._headers, (b"content-length", b"0")] if method == "POST" else self._headers
        target = (self._root + path).encode()
        try:
            async with self._transport.exchange(method.encode(), target, headers, b"") as answer:
                if answer.status >= 300:
                    raise _refusal(answer.status, await _whole(answer))
                yield answer
        except (FluidMCPError, ValueError) as error:
            raise NoGateway(printable(f"no answer from a gateway: {error}")) from None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()


@asynccontextmanager
async def connected(config: str | None, url: str | None) -> AsyncIterator[Remote]:
    """The gateway at ``url``, or that of this user which runs ``config``, or the only one of this user.

    Raises:
        NoGateway: there is none.
        click.UsageError: there are several, or the URL is none.
        BadConfiguration: a setting cannot be used.
    """
    try:
        remote = Remote(*_at(url)) if url is not None else await _found(config)
    except ConfigError as error:
        raise BadConfiguration(error) from None
    except FluidMCPError as error:
        raise NoGateway(str(error)) from None
    try:
        yield remote
    finally:
        with anyio.CancelScope(shield=True):
            await remote.aclose()


def _at(url: str) -> tuple[Address, str | None]:
    try:
        end = parse_base_url(url)
    except ConfigError as error:
        raise click.UsageError(f"--url {error.problem}; write it like http://127.0.0.1:8099") from None
    return Address(end.scheme, end.host, end.port, end.root), client_key()


async def _found(config: str | None) -> Remote:
    folder = _runtime_dir(config)
    paths = control_sockets(folder, None if config is None else os.path.realpath(config))  # noqa: ASYNC240
    if not paths:
        which = "" if config is None else f" with {config}"
        remedy = "" if config is not None else "; if its file sets runtime_dir, name it with --config"
        raise NoGateway(f"no gateway of yours is running{which} (looked in {folder}){remedy}")
    if len(paths) > 1:
        lines = [await _introduced(path) for path in paths]
        raise click.UsageError("\n".join(["several gateways are running; choose one with --config or --url:", *lines]))
    return Remote(_socket(paths[0]))


def _runtime_dir(config: str | None) -> Any:
    if config is not None:
        try:
            return load_config(config).settings.runtime_dir
        except ConfigError:  # what a gateway has read may have been spoilt since
            pass
    return read_settings().runtime_dir


async def _introduced(path: str) -> str:
    remote = Remote(_socket(path))
    try:
        facts = await remote.ask("GET", "/")
        return printable(f"  {facts['config']} at {facts['url']}, pid {facts['pid']}")
    except click.ClickException:
        return f"  {path}, which does not answer"
    finally:
        await remote.aclose()


def _socket(path: str) -> Address:
    return Address("http", "localhost", 80, uds=path)


async def _whole(answer: Response) -> bytes:
    body = bytearray()
    async for chunk in answer.body:
        body += chunk
        if len(body) > _MOST:
            raise ValueError("it does not end")
    return bytes(body)


def _refusal(status: int, body: bytes) -> click.ClickException:
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error["code"]
    except (ValueError, LookupError, TypeError):
        return NoGateway(f"what answers with status {status} is no gateway")
    if error.get("type") == CONFIGURATION:
        return _Unusable(printable(message))
    if code == "invalid_api_key":
        message = f"{message} {CLIENT_KEY} is where it is taken from."
    return click.ClickException(printable(message))
