"""What the user wrote: parsed once, checked, frozen."""

from .endpoint import Endpoint
from .inheritance import child_environment
from .load import load_config, parse_config
from .models import Environment, GatewayConfig, ModelConfig
from .options import RestartPolicy
from .settings import Settings, configured_path, read_settings

__all__ = [
    "Endpoint",
    "Environment",
    "GatewayConfig",
    "ModelConfig",
    "RestartPolicy",
    "Settings",
    "child_environment",
    "configured_path",
    "load_config",
    "parse_config",
    "read_settings",
]
