"""Where a model's server listens, in the words of ``upstream``."""

from __future__ import annotations

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.upstream.client import Address

__all__ = ["CHOSEN", "address_of", "displayed"]

CHOSEN = Address("http", "localhost", 80, uds="")
"""Names a server whose Unix socket is chosen at each launch; connecting to it fails."""


def address_of(model: ModelConfig) -> Address:
    """The address in the model's ``base_url``, the one derived from its arguments, or ``CHOSEN``."""
    endpoint = model.endpoint
    if endpoint is None:
        return CHOSEN
    return Address(endpoint.scheme, endpoint.host, endpoint.port, endpoint.root, endpoint.uds)


def displayed(address: Address) -> str:
    """``http://127.0.0.1:8001`` or ``unix:/run/…``."""
    return address.url if address.uds is None else f"unix:{address.uds}"
