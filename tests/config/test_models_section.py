"""Every refusal of the contract that concerns ``llmModels``: its code, its place and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluidmcp_proxy.config import RestartPolicy, parse_config
from fluidmcp_proxy.config.options import Start
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]
VLLM = {"command": "vllm", "args": ["serve", "m", "--port", "8001"]}
REMOTE = {"endpoints": {"base_url": "http://localhost:11434/v1"}}


def one(entry: object) -> dict[str, Any]:
    return {"llmModels": {"m": entry}}


def test_the_documented_files_load_unchanged(documented: dict[str, Any], short: dict[str, Any]) -> None:
    model = parse_config(documented, environ={}).models["vllm"]
    assert model.command == "vllm"
    assert list(model.args) == documented["llmModels"]["vllm"]["args"]
    assert model.endpoint is not None
    assert (model.endpoint.scheme, model.endpoint.host, model.endpoint.port, model.endpoint.root) == (
        "http",
        "localhost",
        8001,
        "",
    )
    assert model.served_names == ("facebook/opt-125m",)
    assert list(parse_config(short, environ={}).models) == ["vllm"]


def test_defaults_are_the_contracts() -> None:
    model = parse_config(one(VLLM), environ={}).models["m"]
    values = model.model_dump(exclude={"id", "command", "args", "endpoints", "served_names"})
    assert values == {
        "start": Start.EAGER,
        "idle_timeout": None,
        "group": None,
        "sleep": None,
        "startup_timeout": 900.0,
        "stop_timeout": 30.0,
        "restart_policy": RestartPolicy.ON_FAILURE,
        "max_restarts": 3,
        "restart_delay": 1.0,
        "readiness_path": "/health",
        "liveness": False,
        "stall_timeout": 300.0,
        "verify_listener": True,
        "max_concurrency": None,
        "max_queue": 512,
        "queue_timeout": 600.0,
        "connect_timeout": 5.0,
        "first_byte_timeout": None,
        "stream_idle_timeout": None,
        "aliases": (),
        "replicas": 1,
        "gpus": (),
        "affinity": None,
        "extra_paths": (),
        "api_key": None,
    }


def test_a_model_without_a_command_is_forwarded_to() -> None:
    model = parse_config(one(REMOTE), environ={}).models["m"]
    assert model.command is None
    assert model.readiness_path == "/v1/models"


@pytest.mark.parametrize(
    ("document", "code", "path"),
    [
        ([], "config_invalid_type", ""),
        ("x", "config_invalid_type", ""),
        ({"llmModels": []}, "config_invalid_type", "llmModels"),
        ({"llmModels": None}, "config_invalid_type", "llmModels"),
        (one([]), "config_invalid_type", "llmModels.m"),
        (one(None), "config_invalid_type", "llmModels.m"),
        (one("vllm"), "config_invalid_type", "llmModels.m"),
        ({}, "no_models", "llmModels"),
        ({"llmModels": {}}, "no_models", "llmModels"),
        ({"mcpServers": {}}, "no_models", "llmModels"),
        ({"llmModels": {"m": VLLM}, "mcpServers": []}, "invalid_value", "mcpServers"),
        ({"llmModels": {"m": VLLM}, "gateway": 1}, "invalid_value", "gateway"),
        ({"llmModels": {"": VLLM}}, "invalid_model_id", "llmModels['']"),
        ({"llmModels": {"-m": VLLM}}, "invalid_model_id", "llmModels.-m"),
        ({"llmModels": {"a/b": VLLM}}, "invalid_model_id", "llmModels['a/b']"),
        ({"llmModels": {"m\n": VLLM}}, "invalid_model_id", r"llmModels['m\n']"),
        ({"llmModels": {"é": VLLM}}, "invalid_model_id", "llmModels['é']"),
        ({"llmModels": {"m" * 65: VLLM}}, "invalid_model_id", f"llmModels.{'m' * 65}"),
        ({"llmModels": {1: VLLM}}, "invalid_model_id", "llmModels.1"),
        *(
            ({"llmModels": {name: VLLM}}, "reserved_model_id", f"llmModels.{name}")
            for name in ("v1", "health", "ready", "metrics", "models", "static", "docs")
        ),
    ],
)
def test_shape_and_ids(refuse: Refuse, document: Any, code: str, path: str) -> None:
    error = refuse(document)
    assert (error.code, error.path) == (code, path)
    assert error.remedy


def test_the_longest_id() -> None:
    assert list(parse_config({"llmModels": {"M" * 64: VLLM}}, environ={}).models) == ["M" * 64]


@pytest.mark.parametrize(
    ("entry", "code", "path"),
    [
        ({**VLLM, "command": 1}, "invalid_command", "command"),
        ({**VLLM, "command": ["vllm"]}, "invalid_command", "command"),
        ({**VLLM, "command": ""}, "invalid_command", "command"),
        ({**VLLM, "command": " "}, "invalid_command", "command"),
        ({**VLLM, "command": "vllm serve"}, "invalid_command", "command"),
        ({**VLLM, "command": "~/bin/vllm"}, "invalid_command", "command"),
        ({**VLLM, "command": "a\0b"}, "invalid_command", "command"),
        ({"args": ["serve"], **REMOTE}, "invalid_command", "command"),
        ({**VLLM, "args": "serve"}, "invalid_args", "args"),
        ({**VLLM, "args": None}, "invalid_args", "args"),
        ({**VLLM, "args": {"0": "serve"}}, "invalid_args", "args"),
        ({**VLLM, "args": ["serve", 8001]}, "invalid_args", "args[1]"),
        ({**VLLM, "args": ["serve", True]}, "invalid_args", "args[1]"),
        ({**VLLM, "args": ["serve", "a\0"]}, "invalid_args", "args[1]"),
        ({**VLLM, "args": ["serve", "\ud800"]}, "invalid_args", "args[1]"),
        ({**VLLM, "args": ["serve", "m", "--port"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port", "x"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port", "0"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port", "65536"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port", "-1"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port=٨"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port=${PORT}"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "–port", "8001"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "-–port", "8001"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "—port", "8001"]}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--port 8001"]}, "invalid_args", "args[2]"),
        ({"command": "vllm", "args": ["serve", "m", "--uds", "s"]}, "invalid_args", "args[2]"),
        ({"command": "vllm", "args": ["serve", "m", "--uds"]}, "invalid_args", "args[2]"),
        ({"command": "vllm", "args": ["serve", "m", "--uds", "/s\n"]}, "invalid_args", "args[2]"),
        ({"command": "vllm", "args": ["serve", "m", "--uds", "/" + "s" * 103]}, "invalid_args", "args[2]"),
        ({"command": "vllm", "args": ["serve", "m", "--uds", "/s"], **REMOTE}, "port_mismatch", "endpoints.base_url"),
        ({**VLLM, "env": []}, "invalid_env", "env"),
        ({**VLLM, "env": None}, "invalid_env", "env"),
        ({**VLLM, "env": {"A": 1}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"A": None}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"A": True}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"A": "\0"}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"": "x"}}, "invalid_env", "env['']"),
        ({**VLLM, "env": {"A=B": "x"}}, "invalid_env", "env['A=B']"),
        ({**VLLM, "env": {"A": "${"}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"A": "${B:-c}"}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"A": "${}"}}, "invalid_env", "env.A"),
        ({**VLLM, "env": {"A": "${B}"}}, "missing_env_variable", "env.A"),
        ({**VLLM, "api_key": "${B}"}, "missing_env_variable", "api_key"),
        ({**VLLM, "endpoints": "http://localhost:8001"}, "invalid_base_url", "endpoints"),
        ({**VLLM, "endpoints": None}, "invalid_base_url", "endpoints"),
        ({**VLLM, "endpoints": []}, "invalid_base_url", "endpoints"),
        ({**VLLM, "endpoints": {"base_url": None}}, "invalid_base_url", "endpoints.base_url"),
        ({**VLLM, "endpoints": {"base_url": 8001}}, "invalid_base_url", "endpoints.base_url"),
        ({**VLLM, "endpoints": {"base_url": ""}}, "invalid_base_url", "endpoints.base_url"),
        ({}, "invalid_base_url", "endpoints.base_url"),
        ({"command": "llama-server"}, "invalid_base_url", "endpoints.base_url"),
        ({"command": "vllm", "args": ["serve", "--config", "c.yaml"]}, "invalid_base_url", "endpoints.base_url"),
        ({**VLLM, "args": ["serve", "m", "--port", "1", "--host", "a b"]}, "invalid_base_url", "endpoints.base_url"),
        ({**VLLM, "endpoints": {"base_url": "http://localhost:8002/v1"}}, "port_mismatch", "endpoints.base_url"),
        ({**VLLM, "endpoints": {"base_url": "http://localhost/v1"}}, "port_mismatch", "endpoints.base_url"),
        ({"command": "vllm", "args": ["serve", "m"], "endpoints": {"base_url": "http://localhost:8001"}},
         "port_mismatch", "endpoints.base_url"),
        ({"command": "python", "args": ["-m", "vllm.entrypoints.openai.api_server", "--model", "m"],
          "endpoints": {"base_url": "http://localhost:8001"}}, "port_mismatch", "endpoints.base_url"),
    ],
)  # fmt: skip
def test_keys_of_a_model(refuse: Refuse, entry: Any, code: str, path: str) -> None:
    error = refuse(one(entry))
    assert (error.code, error.path) == (code, f"llmModels.m.{path}")


@pytest.mark.parametrize(
    "name",
    ["startup_timeout", "stop_timeout", "stall_timeout", "restart_delay",
     "queue_timeout", "connect_timeout", "first_byte_timeout",
     "stream_idle_timeout", "max_restarts", "idle_timeout", "sleep", "max_concurrency", "max_queue"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["5", True, -1, float("nan"), float("inf"), [], {}, "${N}"])
def test_numbers_are_json_numbers(refuse: Refuse, name: str, value: Any) -> None:
    error = refuse(one({**VLLM, name: value}))
    assert (error.code, error.path) == ("invalid_value", f"llmModels.m.{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("startup_timeout", 0), ("stall_timeout", 0), ("liveness", 1),
        ("connect_timeout", 0), ("first_byte_timeout", 0), ("restart_delay", 61),
        ("startup_timeout", None), ("max_restarts", 1.5), ("max_restarts", None), ("restart_policy", "never"),
        ("restart_policy", True), ("restart_policy", None), ("verify_listener", "false"), ("verify_listener", 0),
        ("idle_timeout", 0), ("sleep", 0), ("sleep", 3), ("sleep", 1.0), ("max_concurrency", 0), ("max_queue", None),
        ("start", "lazy"), ("start", True), ("group", ""), ("group", "a b"), ("group", 1), ("group", "a" * 65),
        ("readiness_path", "health"), ("readiness_path", ""), ("readiness_path", "/a b"), ("readiness_path", "/a\n"),
        ("readiness_path", 1), ("extra_paths", "/metrics"), ("extra_paths", None), ("api_key", ""), ("api_key", 1),
        ("api_key", "a b"), ("api_key", "a\nb"), ("api_key", "schlüssel"),
    ],
)  # fmt: skip
def test_other_values(refuse: Refuse, name: str, value: Any) -> None:
    error = refuse(one({**VLLM, name: value}))
    assert (error.code, error.path) == ("invalid_value", f"llmModels.m.{name}")


@pytest.mark.parametrize(
    "path", ["tokenize", "", "/a*b", "/a/../b", "/./a", "//a", "/a?b", "/a#b", "/%2e", "/a b", 1, "**"]
)
def test_extra_paths_are_absolute(refuse: Refuse, path: Any) -> None:
    error = refuse(one({**VLLM, "extra_paths": ["/ok", path]}))
    assert (error.code, error.path) == ("invalid_value", "llmModels.m.extra_paths[1]")


def test_good_values() -> None:
    entry = {
        **VLLM, "startup_timeout": 1, "first_byte_timeout": 2.5, "stream_idle_timeout": None,
        "restart_policy": "always",
        "extra_paths": ["/tokenize", "/admin/*", "/*"], "api_key": "k", "stop_timeout": 0, "max_restarts": 0,
        "readiness_path": "/ping?deep=1", "verify_listener": False,
    }  # fmt: skip
    model = parse_config(one(entry), environ={}).models["m"]
    assert (model.startup_timeout, model.first_byte_timeout, model.restart_policy) == (1.0, 2.5, RestartPolicy.ALWAYS)
    assert model.extra_paths == ("/tokenize", "/admin/*", "/*")
    assert model.api_key is not None
    assert model.api_key.get_secret_value() == "k"


@pytest.mark.parametrize(
    ("document", "path", "hint"),
    [
        ({"llmModel": {}}, "llmModel", "'llmModels'"),
        ({"llmModels": {"m": VLLM}, "Gateway": {}}, "Gateway", "'gateway'"),
        (one({**VLLM, "comand": "x"}), "llmModels.m.comand", "'command'"),
        (one({**VLLM, "start_up_timeout": 1}), "llmModels.m.start_up_timeout", "'startup_timeout'"),
        (one({**VLLM, "restartPolicy": "no"}), "llmModels.m.restartPolicy", "'restart_policy'"),
        (one({**VLLM, "base_url": "x"}), "llmModels.m.base_url", "the known ones are command, args"),
        (one({**VLLM, "endpoints": {"baseUrl": "x"}}), "llmModels.m.endpoints.baseUrl", "'base_url'"),
        ({"llmModels": {"m": VLLM}, "gateway": {"prot": 1}}, "gateway.prot", "'port'"),
    ],
)  # fmt: skip
def test_unknown_keys_name_the_nearest(refuse: Refuse, document: Any, path: str, hint: str) -> None:
    error = refuse(document)
    assert (error.code, error.path) == ("unknown_key", path)
    assert hint in error.remedy


def test_schema_key_is_for_editors() -> None:
    assert parse_config({"$schema": "./schema.json", **one(VLLM)}, environ={}).models


def test_the_first_fault_in_the_files_order_is_reported(refuse: Refuse) -> None:
    entry = {"endpoints": 1, "command": 1, "args": 1}
    assert {refuse({"llmModels": {"a": entry, "b": []}}).path for _ in range(5)} == {"llmModels.a.command"}


def test_when_models_start() -> None:
    document = {
        "llmModels": {
            "alone": VLLM,
            "later": {"command": "vllm", "args": ["serve", "m", "--port", "8002"], "start": "on_demand"},
            "grouped": {"command": "vllm", "args": ["serve", "m", "--port", "8003"], "group": "gpu0"},
            "first": {"command": "vllm", "args": ["serve", "m", "--port", "8004"], "group": "gpu0", "start": "eager"},
            "remote": {**REMOTE, "group": "gpu0"},
        }
    }
    models = parse_config(document, environ={}).models
    assert {name: str(model.start) for name, model in models.items()} == {
        "alone": "eager",
        "later": "on_demand",
        "grouped": "on_demand",
        "first": "eager",
        "remote": "eager",
    }


def test_two_eager_models_of_a_group(refuse: Refuse) -> None:
    first = {**VLLM, "group": "g", "start": "eager"}
    second = {**first, "args": ["serve", "m", "--port", "8002"]}
    error = refuse({"llmModels": {"a": first, "b": second}})
    assert (error.code, error.path) == ("invalid_value", "llmModels.b.start")
    assert "'a'" in error.problem
    assert parse_config({"llmModels": {"a": first, "b": {**second, "group": "h"}}}, environ={}).models
    assert parse_config({"llmModels": {"a": first, "b": {**second, "start": "on_demand"}}}, environ={}).models


def test_sleep_needs_sleep_mode(refuse: Refuse) -> None:
    error = refuse(one({**VLLM, "sleep": 1}))
    assert (error.code, error.path) == ("invalid_value", "llmModels.m.sleep")
    assert "--enable-sleep-mode" in error.remedy
    for able in (
        {**VLLM, "args": [*VLLM["args"], "--enable-sleep-mode"]},
        {**VLLM, "args": [*VLLM["args"], "--config", "c.yaml"]},
        {"command": "./serve.sh", **REMOTE},
    ):
        assert parse_config(one({**able, "sleep": 2}), environ={}).models["m"].sleep == 2
