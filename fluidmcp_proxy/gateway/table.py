"""What the gateway knows of its models for requests: one immutable table, swapped whole for another configuration.

A request keeps the one that it has met.
"""

from __future__ import annotations

from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.gateway.access import ServedBy
from fluidmcp_proxy.gateway.entrance import Entrance, OwnersEntrance
from fluidmcp_proxy.models.address import address_of

__all__ = ["Table"]


class Table:
    """Doors with their routes, and what each model's server gets as Host and Authorization."""

    __slots__ = ("authorizations", "config", "entrance", "hosts", "owners_entrance")

    def __init__(self, config: GatewayConfig, served_by: ServedBy) -> None:
        self.config = config
        self.entrance = Entrance(config, served_by)
        self.owners_entrance = OwnersEntrance(config)
        self.hosts = {name: address_of(model).authority for name, model in config.models.items()}
        self.authorizations = {
            name: b"Bearer " + model.api_key.get_secret_value().encode() if model.api_key else None
            for name, model in config.models.items()
        }
