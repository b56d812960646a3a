"""Turns a FluidMCP configuration into running LLM endpoints.

``Gateway(load_config("models.json"))`` is an ASGI app: it launches the model servers inside its lifespan and forwards
``/{model}/v1/…`` to them. ``app`` is the same for the file that ``FLUIDMCP_CONFIG`` names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluidmcp_proxy.config.load import load_config
from fluidmcp_proxy.config.models import GatewayConfig, ModelConfig
from fluidmcp_proxy.errors import ConfigError, GatewayError
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.gateway.environment import EnvironmentGateway, create_app
from fluidmcp_proxy.gateway.middleware import GatewayMiddleware
from fluidmcp_proxy.models.state import ModelState, ModelStatus

__version__ = "0.1.0"

if TYPE_CHECKING:
    app: EnvironmentGateway

__all__ = [
    "ConfigError",
    "Gateway",
    "GatewayConfig",
    "GatewayError",
    "GatewayMiddleware",
    "ModelConfig",
    "ModelState",
    "ModelStatus",
    "__version__",
    "app",
    "create_app",
    "load_config",
]


def __getattr__(name: str) -> object:
    """``app``, made when it is asked for (PEP 562)."""
    if name == "app":
        app = globals()["app"] = create_app()
        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
