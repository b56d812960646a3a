"""Turns a FluidMCP configuration into running LLM endpoints.

``Gateway(load_config("models.json"))`` is an ASGI app: it launches the model servers inside its lifespan and forwards
``/{model}/v1/…`` to them. ``app`` is the same for the file that ``FLUIDMCP_CONFIG`` names.
"""

from __future__ import annotations

from fluidmcp_proxy.config.load import load_config
from fluidmcp_proxy.config.models import GatewayConfig, ModelConfig
from fluidmcp_proxy.errors import ConfigError, GatewayError
from fluidmcp_proxy.gateway.app import Gateway
from fluidmcp_proxy.gateway.environment import create_app
from fluidmcp_proxy.gateway.middleware import GatewayMiddleware
from fluidmcp_proxy.models.state import ModelState, ModelStatus

__version__ = "0.1.0"

app = create_app()  # it reads its configuration when its lifespan begins

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
