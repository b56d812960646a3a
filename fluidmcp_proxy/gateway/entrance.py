"""The gateway's door: whether a request may come in, whose it is, and which models there are for them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.errors import InvalidApiKey, PathNotFound
from fluidmcp_proxy.gateway.access import ServedBy, check_host, check_size, check_version, sources_of
from fluidmcp_proxy.gateway.keys import NOBODY, Holder, Identified, Keyring
from fluidmcp_proxy.gateway.routing import Router, is_public
from fluidmcp_proxy.gateway.target import Target, read_target
from fluidmcp_proxy.models.catalog import Catalog
from fluidmcp_proxy.upstream.client import Headers

__all__ = ["Entrance", "OwnersEntrance", "Visitor"]

Scope = MutableMapping[str, Any]


class Visitor(NamedTuple):
    """Somebody who makes a request. ``router`` has the routes that there are for them.

    ``is_known`` is False for somebody without a key where one is needed: only public pages are for them.
    """

    router: Router
    keys: Identified = NOBODY
    is_known: bool = True

    @property
    def is_admin(self) -> bool:
        """Whether they have an admin key."""
        return self.keys.holder is not None and self.keys.holder.is_admin

    def seen(self, catalog: Catalog) -> Catalog:
        """As much of ``catalog`` as there is for them."""
        models = self.keys.models
        return catalog if models is None else catalog.limited_to(models)

    def require_all(self) -> None:
        """For what tells of all models at once.

        Raises:
            PathNotFound: they have a key for some models only.
        """
        if self.keys.models is not None:
            raise PathNotFound("This tells of all models: it is not there for a key that is limited to some.")

    def require_admin(self) -> None:
        """For what is done to models, or tells what their servers print.

        Raises:
            InvalidApiKey: theirs is not an admin key.
        """
        if not self.is_admin:
            raise InvalidApiKey("This needs an admin key: send it as Authorization: Bearer KEY, or x-api-key.")


_OWNER = Identified(Holder("owner", is_admin=True))


class Entrance:
    """The door of one configuration. Whoever has a key for some models meets a gateway that has no others."""

    def __init__(self, config: GatewayConfig, served_by: ServedBy) -> None:
        settings = config.settings
        is_administered = bool(settings.admin_keys)
        self.router = Router(config.models, is_administered=is_administered)
        self._sources = sources_of(settings, served_by)
        self._keyring = Keyring(settings) if settings.api_keys or settings.admin_keys else None
        self._routers: dict[frozenset[str] | None, Router] = {None: self.router}
        for names in self._keyring.limits() if self._keyring is not None else ():
            models = {name: model for name, model in config.models.items() if name in names}
            self._routers[names] = Router(models, is_administered=is_administered)
        self._anybody = Visitor(self.router)
        self.lists_origins = bool(settings.allowed_origins)

    def admit(self, scope: Scope, headers: Headers, noted: Headers) -> Target:
        """The target of an HTTP or WebSocket request that may come in, whoever's it is.

        Raises:
            GatewayError: see ``read_target``, ``check_version``, ``check_size``, ``check_host`` and ``Sources.check``.
        """
        target = read_target(scope)
        check_version(scope)
        check_size(headers)
        host = check_host(noted, scope)
        if self._sources is not None:
            self._sources.check(host, noted)
        return target

    def identify(self, scope: Scope, headers: Headers, target: Target) -> Visitor:
        """Whose request it is.

        Raises:
            InvalidApiKey: it has to be somebody's, and is not.
        """
        if self._keyring is None:
            return self._anybody
        keys = self._keyring.identify(headers, scope.get("subprotocols") or ())
        if not is_public(target.path):
            self._keyring.require(keys)
        return Visitor(self._routers[keys.models], keys, self._keyring.admits(keys))

    def listed_origin(self, noted: Headers) -> bytes | None:
        """The Origin of a request by a page of another site that the configuration lists."""
        origins = [value for name, value in noted if name == b"origin"]
        is_listed = self._sources is not None and len(origins) == 1 and self._sources.lists(origins[0])
        return origins[0] if is_listed else None


class OwnersEntrance(Entrance):
    """The door of the user who runs the gateway, where nobody else comes: it opens everything without a key."""

    def __init__(self, config: GatewayConfig) -> None:
        self.router = Router(config.models, is_administered=True)
        self.lists_origins = False
        self._sources = None
        self._keyring = None
        self._anybody = Visitor(self.router, _OWNER)
