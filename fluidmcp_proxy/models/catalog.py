"""Which names there are, and whose: ids and aliases from the configuration, served names from there and the servers.

A server is asked for its list when it has become ready, and again when somebody wants the list or a name that nobody
has; never to start it. It decides nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from copy import copy
from typing import Any, NamedTuple

import anyio

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import AmbiguousModel, ModelNotFound, ModelRequired, UpstreamError
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.server import Server
from fluidmcp_proxy.models.state import ModelState
from fluidmcp_proxy.upstream.client import Transport

__all__ = ["Catalog", "Found", "list_models"]

logger = logging.getLogger("fluidmcp_proxy.models")

_PATIENCE = 1.0
"""Seconds that a server gets to list its models."""
_FRESH = 2.0
"""Seconds for which a list is not asked for again."""
_WATCH_PERIOD = 1.0
_NAMES_IN_MESSAGE = 50
_MAX_LIST_BYTES = 1024 * 1024

Card = Mapping[str, Any]
"""What a server says about one of its models; ``id`` is its name."""


class Found(NamedTuple):
    """The model that a name means. ``rename`` is what its server calls it, where that is known to be another name."""

    model: str
    rename: str | None = None


class Catalog:
    """The names of all models of a gateway. Of the models that were ``kept`` it knows what ``known`` did."""

    def __init__(
        self, servers: Mapping[str, Server], *, known: Catalog | None = None, kept: Collection[str] = ()
    ) -> None:
        self._servers = servers
        self._own = {name: name for name in servers}
        self._own |= {alias: name for name, server in servers.items() for alias in server.config.aliases}
        self._cards: dict[str, tuple[Card, ...]] = {}
        self._names: dict[str, tuple[str, ...]] = {}  # that a model's server knows
        self._main: dict[str, str | None] = {}  # the one to use for an id or alias
        self._served: dict[str, list[str]] = {}  # the models of each served name
        for name in servers:
            self.learn(name, known._cards[name] if known is not None and name in kept else ())
        self._asked: dict[str, float] = {}  # when a server was last asked
        self._asking: dict[str, anyio.Event] = {}
        self._watching = anyio.CancelScope()

    def limited_to(self, models: Collection[str]) -> Catalog:
        """The same catalog for somebody who may use some ``models`` only: as if there were no others.

        It stays up to date, since it shares what the servers have said.
        """
        limited = copy(self)
        limited._servers = {name: server for name, server in self._servers.items() if name in models}
        limited._own = {name: model for name, model in self._own.items() if model in models}
        return limited

    # Questions

    @property
    def is_single(self) -> bool:
        """Whether there is one model only, which then everything means."""
        return len(self._servers) == 1

    def find(self, name: str) -> Found:
        """The model that ``name`` means: an id or an alias, else a served name.

        Raises:
            ModelNotFound: nobody has it; the message lists the names there are.
            AmbiguousModel: the servers of several models do.
        """
        model = self._own.get(name)
        if model is not None:
            return Found(model, None if name in self._names[model] else self._main[model])
        models = self._serving(name)
        if len(models) == 1:
            return Found(models[0])
        if models:
            there = f"LLM models {', '.join(models)} all serve '{name}'; name one of them by its id."
            raise AmbiguousModel(there, param="model")
        raise ModelNotFound(f"There is no LLM model '{name[:256]}'. {self._there_are()}", param="model")

    async def look_up(self, name: str | None) -> Found:
        """Like ``find``, after asking the servers where that may help; with a single model everything means that.

        Raises:
            ModelRequired: no name, and several models.
        """
        if name in self._own:
            model = self._own[name]
            if not self._names[model]:
                await self._ask(model)
        elif self.is_single:
            return Found(next(iter(self._servers)))  # the server may know more names than it lists
        elif name is None:
            raise ModelRequired(f"The request does not say which model it is for. {self._there_are()}", param="model")
        elif not self._serving(name):
            await self.refresh()
        return self.find(name)

    def is_unanswered(self, name: str) -> bool:
        """Whether ``name`` is an id or alias of a model whose server is not there yet to tell what it calls itself."""
        model = self._own.get(name)
        return model is not None and not self._names[model] and self._servers[model].transport is None

    async def meet(self, model: str) -> None:
        """Ask the server of ``model``, which is there now, for its names."""
        await self._ask(model)

    def cards(self) -> Iterator[dict[str, Any]]:
        """Every name that is one model's, as OpenAI's list has it, with what the server says about it."""
        for model, server in self._servers.items():
            served = (name for name in self._names[model] if len(self._serving(name)) == 1)
            for name in dict.fromkeys([model, *server.config.aliases, *served]):
                if self._own.get(name, model) == model:
                    yield self._card(name, model, server)

    def card(self, name: str) -> dict[str, Any]:
        """One of them; raises as ``find`` does."""
        model = self.find(name).model
        return self._card(name, model, self._servers[model])

    def _card(self, name: str, model: str, server: Server) -> dict[str, Any]:
        told = {card["id"]: card for card in self._cards[model]}
        extras = {**(told.get(name) or told.get(self._main[model] or "") or {})}
        status, created, owner = server.status, extras.get("created"), extras.get("owned_by")
        own = {
            "id": name,
            "object": "model",
            "created": created if isinstance(created, int) else int(status.since),
            "owned_by": owner if isinstance(owner, str) else "fluidmcp",
        }
        return {**own, **extras, **own, "model_id": model, "state": status.state}

    def _serving(self, name: str) -> list[str]:
        """The models that serve ``name``."""
        return [model for model in self._served.get(name, ()) if model in self._servers]

    def _there_are(self) -> str:
        served = (name for name in self._served if len(self._serving(name)) == 1)
        names = list(dict.fromkeys([*self._own, *served]))
        return f"The models are: {', '.join(names[:_NAMES_IN_MESSAGE])}{', …' * (len(names) > _NAMES_IN_MESSAGE)}."

    # What the servers say

    def learn(self, model: str, cards: tuple[Card, ...]) -> None:
        """Take what the server of ``model`` says about its models in place of what it said before."""
        stated = self._servers[model].config.served_names
        base = [card["id"] for card in cards if not card.get("parent")]  # not the LoRA adapters
        self._cards[model] = cards
        self._names[model] = tuple(dict.fromkeys([*stated, *(card["id"] for card in cards)]))
        known = [name for name in stated if name in base] or (base if len(base) == 1 else stated)
        self._main[model] = known[0] if known else None
        self._served.clear()  # not a new one, which a limited catalog would not see
        for owner, names in self._names.items():
            for name in names:
                self._served.setdefault(name, []).append(owner)

    async def refresh(self) -> None:
        """Ask every server that is there, at once, and return within a second or so."""
        async with anyio.create_task_group() as tasks:
            for model in self._servers:
                tasks.start_soon(self._ask, model)

    async def watch(self) -> None:
        """Ask each server that has become ready, and warn of names that it does not know, until ``close()``."""
        seen: dict[str, float] = {}
        with self._watching:
            while True:
                for model, server in self._servers.items():
                    status = server.status
                    if status.state is ModelState.READY and seen.get(model) != status.since:
                        seen[model] = status.since
                        await self._ask(model)
                        self._compare(server.config)
                await anyio.sleep(_WATCH_PERIOD)

    def close(self) -> None:
        """End ``watch``."""
        self._watching.cancel()

    async def _ask(self, model: str) -> None:
        while (asking := self._asking.get(model)) is not None:
            await asking.wait()
        server = self._servers[model]
        transport = server.transport
        if transport is None or anyio.current_time() - self._asked.get(model, -_FRESH) < _FRESH:
            return
        self._asking[model] = anyio.Event()
        try:
            with anyio.move_on_after(_PATIENCE):
                cards = await list_models(transport, server.config)
                if cards is not None:
                    self.learn(model, cards)
            self._asked[model] = anyio.current_time()
        finally:
            self._asking.pop(model).set()

    def _compare(self, config: ModelConfig) -> None:
        listed = [card["id"] for card in self._cards[config.id]]
        unknown = [name for name in config.served_names if name not in listed]
        if listed and unknown:
            message = "model %s: its server does not serve %s, which its arguments name, but %s"
            logger.warning(message, config.id, ", ".join(unknown), ", ".join(listed[:10]))


async def list_models(transport: Transport, config: ModelConfig) -> tuple[Card, ...] | None:
    """What ``GET /v1/models`` of a server says; None when it says nothing that can be used."""
    address = address_of(config)
    headers = [(b"host", address.authority)]
    if config.api_key is not None:
        headers.append((b"authorization", b"Bearer " + config.api_key.get_secret_value().encode()))
    body = bytearray()
    try:
        async with transport.exchange(b"GET", f"{address.root}/v1/models".encode(), headers) as response:
            async for chunk in response.body:
                body += chunk
                if len(body) > _MAX_LIST_BYTES:
                    return None
            return _cards(body) if response.status == 200 else None
    except UpstreamError:
        return None


def _cards(body: bytes | bytearray) -> tuple[Card, ...] | None:
    try:
        data = json.loads(body)["data"]
        return tuple(card for card in data if isinstance(card["id"], str) and card["id"].encode())
    except (ValueError, LookupError, TypeError, RecursionError):  # not such a list
        return None
