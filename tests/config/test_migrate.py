"""The deprecated wrapper becomes an entry that loads; nothing else changes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.migrate import migrate


def wrapper(**env: Any) -> dict[str, Any]:
    return {"command": "python", "args": ["vllm_server.py"], "env": {"VLLM_MODEL_NAME": "org/m", **env}}


def test_the_documented_migration(deprecated: dict[str, Any], short: dict[str, Any]) -> None:
    migration = migrate(deprecated)
    assert migration.document == short
    assert migration.changes == ("mcpServers.vllm -> llmModels.vllm",)
    assert json.loads(migration.text) == short
    assert not parse_config(migration.document, environ={}).warnings


@pytest.mark.parametrize(
    "entry",
    [
        {"command": "python", "args": ["-u", "/opt/x/vllm_server.py"]},
        {"command": "/opt/x/vllm_server.py"},
        {"command": "uv", "args": ["run", "x"], "env": {"VLLM_MODEL_NAME": "m"}},
    ],
)
def test_each_form_of_the_wrapper(entry: dict[str, Any]) -> None:
    assert list(migrate({"mcpServers": {"s": entry}}).document["llmModels"]) == ["s"]


@pytest.mark.parametrize(
    "entry", [None, [], {}, {"command": 1, "args": [1], "env": []}, {"command": "npx", "args": ["x"]}]
)
def test_other_servers_are_untouched(entry: Any) -> None:
    document = {"mcpServers": {"other": entry}, "x": 1}
    migration = migrate(document)
    assert migration.document == document
    assert migration.changes == ()


def test_other_servers_and_keys_stay_in_place() -> None:
    other = {"command": "npx", "args": ["-y", "x"], "env": {"K": "v"}, "more": [1, {"a": None}]}
    document = {"gateway": {"port": 1}, "mcpServers": {"a": other, "old": wrapper(), "b": other}}
    before = copy.deepcopy(document)
    migration = migrate(document)
    assert document == before, "the input is not changed"
    assert list(migration.document) == ["llmModels", "gateway", "mcpServers"]
    assert migration.document["mcpServers"] == {"a": other, "b": other}


def test_ports_and_ids_are_free() -> None:
    models = {
        "old": {"command": "vllm", "args": ["serve", "m", "--port=8001"]},
        "remote": {"endpoints": {"base_url": "http://localhost:8002/v1"}},
    }
    migration = migrate(
        {"llmModels": models, "mcpServers": {"old": wrapper(), "health": wrapper(), "a b/c": wrapper()}}
    )
    config = parse_config(migration.document, environ={})
    assert list(config.models) == ["old", "remote", "old-2", "health-2", "a-b-c"]
    ports = [model.endpoint.port for model in config.models.values() if model.endpoint is not None]
    assert ports == [8001, 8002, 8003, 8004, 8005]


def test_variables_with_an_obvious_argument() -> None:
    env = {
        "VLLM_DTYPE": "float16",
        "VLLM_MAX_MODEL_LEN": 2048,
        "HF_TOKEN": "${HF_TOKEN}",
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    entry = migrate({"mcpServers": {"s": wrapper(**env)}}).document["llmModels"]["s"]
    assert entry["args"] == ["serve", "org/m", "--port", "8001", "--max-model-len", "2048", "--dtype", "float16"]
    assert entry["env"] == {"HF_TOKEN": "${HF_TOKEN}", "VLLM_LOGGING_LEVEL": "DEBUG"}


def test_numbers_in_env_become_strings() -> None:
    entry = migrate({"mcpServers": {"s": wrapper(A=1, B=True)}}).document["llmModels"]["s"]
    assert entry["env"] == {"A": "1", "B": "true"}


def test_a_wrapper_that_does_not_name_its_model() -> None:
    migration = migrate({"mcpServers": {"s": {"command": "python", "args": ["vllm_server.py"]}}})
    assert migration.document["llmModels"]["s"]["args"][1] == "MODEL"
    assert migration.advice[0].startswith("llmModels.s.args[1]: ")


def test_a_model_named_by_a_variable() -> None:
    migration = migrate({"mcpServers": {"s": wrapper(VLLM_MODEL_NAME="${MODEL_NAME}")}})
    assert "not expanded" in migration.advice[0]


def test_it_is_idempotent(deprecated: dict[str, Any]) -> None:
    once = migrate(deprecated).document
    assert migrate(once).document == once
    assert migrate(once).changes == ()


def test_no_value_is_shown() -> None:
    migration = migrate({"mcpServers": {"s": wrapper(HF_TOKEN="hunter2-hunter2")}})
    assert "hunter2-hunter2" in migration.text
    assert "hunter2-hunter2" not in str(migration.changes + migration.advice)
