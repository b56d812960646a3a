"""Where a model's server is configured to listen, in the words of ``upstream``."""

from __future__ import annotations

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.upstream.client import Address

__all__ = ["address_of"]


def address_of(model: ModelConfig) -> Address:
    """The address in the model's ``base_url``, or the one derived from its arguments."""
    endpoint = model.endpoint
    assert endpoint is not None
    return Address(endpoint.scheme, endpoint.host, endpoint.port, endpoint.root)
