"""The JSON Schema of a configuration file, for editors: generated from the models that read it.

It says what a schema can say. References to variables, ports and what must hold between models are left to ``check``.
"""

from __future__ import annotations

from typing import Any

from .options import MODEL_ID, RESERVED_IDS, ModelEntry
from .settings import GatewaySection

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# Without a command someone else runs the server: its address must be written, and there is nothing to give args to or
# to copy. With one there is one address at most.
_WITHOUT_COMMAND = {
    "if": {"properties": {"command": {"type": "string"}}, "required": ["command"]},
    "then": {"properties": {"endpoints": {"type": "object"}}},
    "else": {
        "required": ["endpoints"],
        "properties": {"endpoints": {"required": ["base_url"]}, "args": {"maxItems": 0}, "replicas": {"maximum": 1}},
    },
}


def json_schema() -> dict[str, Any]:
    """The schema of the file, in the 2020-12 dialect."""
    model = ModelEntry.model_json_schema(ref_template="#/$defs/{model}")
    gateway = GatewaySection.model_json_schema(ref_template="#/$defs/{model}")
    definitions = {**model.pop("$defs", {}), **gateway.pop("$defs", {})}
    base_url = definitions["EndpointsEntry"]["properties"]["base_url"]
    # None stands for "not written"; null itself is refused.
    del base_url["anyOf"], base_url["default"], model["properties"]["endpoints"]["default"]
    url = {"type": "string", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"}
    base_url |= url
    definitions["EndpointEntry"]["properties"]["base_url"] |= url
    return {
        "$schema": DIALECT,
        "title": "FluidMCP configuration",
        "type": "object",
        "required": ["llmModels"],
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string", "description": "The schema's address, for editors; ignored."},
            "llmModels": _models(),
            "gateway": {"$ref": "#/$defs/GatewaySection"},
            "mcpServers": {
                "type": "object",
                "description": "MCP servers; they may share the file, but are not served here.",
            },
        },
        "$defs": {**definitions, "ModelEntry": {**model, **_WITHOUT_COMMAND}, "GatewaySection": gateway},
    }


def _models() -> dict[str, Any]:
    reserved = "|".join(RESERVED_IDS)
    return {
        "type": "object",
        "description": "The models by id; the id is the first path segment of a model's URLs.",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^(?!(?:{reserved})$){MODEL_ID.pattern}$"},
        "additionalProperties": {"$ref": "#/$defs/ModelEntry"},
    }
