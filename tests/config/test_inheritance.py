"""What a model's program gets as its environment."""

from __future__ import annotations

from typing import Any

import pytest

from fluidmcp_proxy.config import child_environment, parse_config
from fluidmcp_proxy.config.inheritance import server_keep_alive


def test_a_childs_environment(short: dict[str, Any]) -> None:
    short["llmModels"]["vllm"]["env"] = {"A": "model", "FLUIDMCP_X": "on purpose"}
    model = parse_config(short, environ={}).models["vllm"]
    environ = {"A": "gateway", "B": "gateway", "FLUIDMCP_API_KEYS": "secret", "FLUIDMCP_PORT": "1"}
    assert child_environment(model, environ) == {
        "A": "model",
        "B": "gateway",
        "FLUIDMCP_X": "on purpose",
        "PYTHONUNBUFFERED": "1",
        "SPT_NOENV": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    }


def test_the_users_own_keep_alive_wins(short: dict[str, Any]) -> None:
    model = parse_config(short, environ={}).models["vllm"]
    assert child_environment(model, {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "9"})["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "9"
    short["llmModels"]["vllm"]["env"] = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "7"}
    model = parse_config(short, environ={}).models["vllm"]
    assert child_environment(model, {})["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "7"


def test_a_server_that_is_to_sleep_gets_its_routes_for_it() -> None:
    entry = {"command": "vllm", "args": ["serve", "m", "--port", "8001", "--enable-sleep-mode"], "sleep": 1}
    model = parse_config({"llmModels": {"m": entry}}, environ={}).models["m"]
    assert child_environment(model, {})["VLLM_SERVER_DEV_MODE"] == "1"
    awake = parse_config({"llmModels": {"m": {**entry, "sleep": None}}}, environ={}).models["m"]
    assert "VLLM_SERVER_DEV_MODE" not in child_environment(awake, {})


@pytest.mark.parametrize(
    ("environ", "kept"),
    [({}, 3600), ({"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "9"}, 9), ({"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "long"}, None)],
)
def test_how_long_a_vllm_keeps_a_connection(short: dict[str, Any], environ: dict[str, str], kept: float | None) -> None:
    model = parse_config(short, environ={}).models["vllm"]
    assert server_keep_alive(model, environ) == kept


def test_how_long_another_server_keeps_a_connection_is_not_known() -> None:
    models: dict[str, Any] = {
        "far": {"endpoints": {"base_url": "http://127.0.0.1:9"}},
        "other": {"command": "llama-server", "args": ["--port", "9001"]},
    }
    for model in parse_config({"llmModels": models}, environ={}).models.values():
        assert server_keep_alive(model, {}) is None
