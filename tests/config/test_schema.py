"""The JSON Schema says what the loader does, as far as a schema can."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.options import ModelEntry
from fluidmcp_proxy.config.schema import json_schema
from fluidmcp_proxy.config.settings import GatewaySection
from fluidmcp_proxy.errors import ConfigError

VLLM = {"command": "vllm", "args": ["serve", "m", "--port", "8001"]}
SCHEMA = json_schema()


def accepts(document: Any) -> bool:
    return not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(document))


def loads(document: Any) -> bool:
    try:
        parse_config(document, environ={})
    except ConfigError:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_is_described() -> None:
    for name, model in (("ModelEntry", ModelEntry), ("GatewaySection", GatewaySection)):
        properties = SCHEMA["$defs"][name]["properties"]
        assert list(properties) == list(model.model_fields)
        assert all(prop.get("description") for prop in properties.values())


def test_the_documented_files(documented: dict[str, Any], short: dict[str, Any], deprecated: dict[str, Any]) -> None:
    assert accepts(documented)
    assert accepts({**short, **deprecated})


@pytest.mark.parametrize(
    ("document", "valid"),
    [
        ({"llmModels": {"m": VLLM}}, True),
        ({"llmModels": {"m": {"endpoints": {"base_url": "https://host/api"}}}}, True),
        ({"llmModels": {"m": {**VLLM, "startup_timeout": 1, "first_byte_timeout": None}}}, True),
        ({"llmModels": {"m": {**VLLM, "restart_policy": "always", "extra_paths": ["/a"], "env": {"A": "b"}}}}, True),
        (
            {"$schema": "x", "llmModels": {"m": VLLM}, "gateway": {"port": 1, "log_dir": "/l"}, "mcpServers": {"a": 1}},
            True,
        ),
        ({"llmModels": {"m": {"endpoints": [{"base_url": "http://a"}, {"base_url": "http://b"}]}}}, True),
        ({"llmModels": {"m": {"command": "vllm", "args": ["serve", "m"], "replicas": 2, "gpus": [0, 1]}}}, True),
        ({"llmModels": {"m": {"command": "vllm", "args": ["serve", "m"], "affinity": "header:X-Session"}}}, True),
        ({"llmModels": {"m": {"command": "vllm", "args": ["serve", "m"], "affinity": "session"}}}, False),
        ({"llmModels": {"m": {"command": "vllm", "args": ["serve", "m"], "replicas": 0}}}, False),
        ({"llmModels": {"m": {"endpoints": [{}]}}}, False),
        ({"llmModels": {"m": {"endpoints": [{"base_url": "a"}]}}}, False),
        ({"llmModels": {"m": {"endpoints": {"base_url": "http://a"}, "replicas": 2}}}, False),
        ({"llmModels": {"m": {**VLLM, "endpoints": [{"base_url": "http://a"}]}}}, False),
        (
            {
                "llmModels": {"m": VLLM},
                "gateway": {
                    "api_keys": ["0" * 16, {"name": "a", "key": "1" * 16, "models": ["m"]}, {"sha256": "2" * 64}],
                    "allowed_hosts": ["h"],
                    "allow_open": True,
                },
            },
            True,
        ),
        ({"llmModels": {"m": VLLM}, "gateway": {"api_keys": [{"name": "a"}]}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"api_keys": [{"key": "1" * 16, "sha256": "2" * 64}]}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"api_keys": [{"kye": "1" * 16}]}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"api_keys": "0123456789abcdef"}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"api_keys": [{"sha256": "x"}]}}, False),
        ({}, False),
        ([], False),
        ({"llmModels": {}}, False),
        ({"llmModels": []}, False),
        ({"llmModels": {"health": VLLM}}, False),
        ({"llmModels": {"-m": VLLM}}, False),
        ({"llmModels": {"m": VLLM}, "x": 1}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"port": "1"}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"prot": 1}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"port": 65536}}, False),
        ({"llmModels": {"m": VLLM}, "gateway": {"log_level": "loud"}}, False),
        ({"llmModels": {"m": VLLM}, "mcpServers": []}, False),
        ({"llmModels": {"m": {}}}, False),
        ({"llmModels": {"m": {"endpoints": {}}}}, False),
        ({"llmModels": {"m": {"endpoints": {"base_url": "localhost:1"}}}}, False),
        ({"llmModels": {"m": {"args": ["x"], "endpoints": {"base_url": "http://x"}}}}, False),
        ({"llmModels": {"m": {**VLLM, "endpoints": {"base_url": None}}}}, False),
        ({"llmModels": {"m": {**VLLM, "endpoints": []}}}, False),
        ({"llmModels": {"m": {**VLLM, "comand": "x"}}}, False),
        ({"llmModels": {"m": {**VLLM, "args": "x"}}}, False),
        ({"llmModels": {"m": {**VLLM, "args": [1]}}}, False),
        ({"llmModels": {"m": {**VLLM, "env": {"A": 1}}}}, False),
        ({"llmModels": {"m": {**VLLM, "startup_timeout": "1"}}}, False),
        ({"llmModels": {"m": {**VLLM, "startup_timeout": 0}}}, False),
        ({"llmModels": {"m": {**VLLM, "startup_timeout": True}}}, False),
        ({"llmModels": {"m": {**VLLM, "max_restarts": 1.5}}}, False),
        ({"llmModels": {"m": {**VLLM, "restart_policy": "never"}}}, False),
        ({"llmModels": {"m": {**VLLM, "readiness_path": "health"}}}, False),
        ({"llmModels": {"m": {**VLLM, "api_key": ""}}}, False),
        ({"llmModels": {"m": {**VLLM, "aliases": ["a/b:c", "d"]}}}, True),
        ({"llmModels": {"m": {**VLLM, "aliases": "a"}}}, False),
    ],
)
def test_schema_and_loader_agree(document: Any, valid: bool) -> None:
    assert accepts(document) is valid
    assert loads(document) is valid
