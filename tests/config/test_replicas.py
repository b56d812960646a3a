"""Copies of a model's server: what may be written, and what each copy is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.replicas import affinity_header, gets_a_socket, replicas_of
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]

VLLM = {"command": "vllm", "args": ["serve", "m"]}
OTHER = {"command": "llama-server", "args": ["-m", "m.gguf"]}


def parse(entry: dict[str, Any]) -> ModelConfig:
    return parse_config({"llmModels": {"m": entry}}, environ={}).models["m"]


def listed(*urls: str) -> dict[str, Any]:
    return {"endpoints": [{"base_url": url} for url in urls]}


@pytest.mark.parametrize(
    ("entry", "code", "path"),
    [
        ({**VLLM, "replicas": 0}, "invalid_value", "replicas"),
        ({**VLLM, "replicas": 65}, "invalid_value", "replicas"),
        ({**VLLM, "replicas": 1.5}, "invalid_value", "replicas"),
        ({**VLLM, "replicas": "2"}, "invalid_value", "replicas"),
        ({**VLLM, "replicas": None}, "invalid_value", "replicas"),
        ({"replicas": 2, "endpoints": {"base_url": "http://a"}}, "invalid_value", "replicas"),
        ({"replicas": 2, **listed("http://a", "http://b")}, "invalid_value", "replicas"),
        ({**VLLM, "args": ["serve", "m", "--port", "8001"], "replicas": 2}, "invalid_args", "args[2]"),
        ({**VLLM, "args": ["serve", "m", "--uds=/s"], "replicas": 2}, "invalid_args", "args[2]"),
        ({**OTHER, "args": ["--port", "8001"], "replicas": 2}, "invalid_args", "args[0]"),
        ({**VLLM, "endpoints": {"base_url": "http://a:8000"}, "replicas": 2}, "invalid_base_url", "endpoints.base_url"),
        ({**OTHER, "args": ["--host", "a b"], "replicas": 2}, "invalid_base_url", "endpoints.base_url"),
        ({**VLLM, "gpus": [0, 1, 2], "replicas": 2}, "invalid_value", "gpus"),
        ({**VLLM, "gpus": [0], "replicas": 2}, "invalid_value", "gpus"),
        ({**VLLM, "gpus": [0, 0]}, "invalid_value", "gpus"),
        ({**VLLM, "gpus": [-1]}, "invalid_value", "gpus[0]"),
        ({**VLLM, "gpus": ["0"]}, "invalid_value", "gpus[0]"),
        ({**VLLM, "gpus": 0}, "invalid_value", "gpus"),
        ({**VLLM, "gpus": [0], "env": {"CUDA_VISIBLE_DEVICES": "0"}}, "invalid_value", "gpus"),
        ({**VLLM, "affinity": "session"}, "invalid_value", "affinity"),
        ({**VLLM, "affinity": "header:"}, "invalid_value", "affinity"),
        ({**VLLM, "affinity": "header:x_y"}, "invalid_value", "affinity"),
        ({**VLLM, "affinity": "header:x\n"}, "invalid_value", "affinity"),
        ({**VLLM, "affinity": 1}, "invalid_value", "affinity"),
        ({"endpoints": []}, "invalid_base_url", "endpoints"),
        ({"endpoints": ["http://a"]}, "invalid_base_url", "endpoints[0]"),
        ({"endpoints": [{}]}, "invalid_base_url", "endpoints[0].base_url"),
        ({"endpoints": [{"base_url": None}]}, "invalid_base_url", "endpoints[0].base_url"),
        ({"endpoints": [{"base_url": "a"}]}, "invalid_base_url", "endpoints[0].base_url"),
        ({"endpoints": [{"base_url": "http://a", "weight": 1}]}, "unknown_key", "endpoints[0].weight"),
        ({**VLLM, **listed("http://a")}, "invalid_base_url", "endpoints"),
        (listed("http://a/v1", "http://b/api/v1"), "invalid_base_url", "endpoints[1].base_url"),
        (listed("http://a", "http://b", "http://A:80/v1"), "duplicate_upstream", "endpoints[2].base_url"),
    ],
)
def test_what_cannot_be_had(refuse: Refuse, entry: dict[str, Any], code: str, path: str) -> None:
    error = refuse({"llmModels": {"m": entry}})
    assert (error.code, error.path) == (code, f"llmModels.m.{path}")
    assert error.problem
    assert error.remedy


def test_an_unknown_key_in_a_list_is_told_the_known_one(refuse: Refuse) -> None:
    assert "'base_url'" in refuse({"llmModels": {"m": {"endpoints": [{"baseurl": "http://a"}]}}}).remedy


def test_one_server_is_itself() -> None:
    model = parse(VLLM)
    assert replicas_of(model) == (model,)
    model = parse(listed("http://a"))
    assert replicas_of(model) == (model,)
    assert model.endpoint is not None
    assert model.endpoint.host == "a"


def test_copies_have_names_of_their_own() -> None:
    model = parse({**VLLM, "replicas": 3, "env": {"A": "b"}})
    copies = replicas_of(model)
    assert [copy.id for copy in copies] == ["m.0", "m.1", "m.2"]
    assert all(copy.args == model.args and dict(copy.env) == {"A": "b"} and not copy.endpoints for copy in copies)


def test_devices_are_dealt_out_in_order() -> None:
    copies = replicas_of(parse({**VLLM, "replicas": 2, "gpus": [0, 1, 3, 2], "env": {"A": "b"}}))
    assert [dict(copy.env) for copy in copies] == [
        {"A": "b", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"A": "b", "CUDA_VISIBLE_DEVICES": "3,2"},
    ]
    (alone,) = replicas_of(parse({**VLLM, "gpus": [5]}))
    assert (alone.id, dict(alone.env)) == ("m", {"CUDA_VISIBLE_DEVICES": "5"})


def test_two_replicas_may_share_a_device() -> None:
    copies = replicas_of(parse({**VLLM, "replicas": 2, "gpus": [0, 0]}))
    assert [copy.env["CUDA_VISIBLE_DEVICES"] for copy in copies] == ["0", "0"]


def test_servers_of_a_list_have_its_addresses() -> None:
    model = parse({**listed("http://a:1/api/v1", "https://b/api"), "affinity": "prefix"})
    copies = replicas_of(model)
    assert [(copy.id, copy.endpoint and copy.endpoint.host) for copy in copies] == [("m.0", "a"), ("m.1", "b")]
    assert model.endpoint is not None
    assert model.endpoint.root == "/api"


@pytest.mark.parametrize(
    ("entry", "socket"),
    [
        (VLLM, True),
        ({**VLLM, "replicas": 2}, True),
        ({**VLLM, "args": ["serve", "--config", "c.yaml"], "replicas": 2}, True),
        ({**VLLM, "args": ["serve", "m", "--port", "1"]}, False),
        ({**OTHER, "replicas": 2}, False),
        ({"command": "docker", "args": ["run", "vllm", "serve"], "verify_listener": False, "replicas": 2}, False),
        (listed("http://a"), False),
    ],
)
def test_who_is_told_a_socket(entry: dict[str, Any], socket: bool) -> None:
    assert gets_a_socket(parse(entry)) is socket


@pytest.mark.parametrize(
    ("affinity", "header"), [("header:X-Session-Id", b"x-session-id"), ("prefix", None), (None, None)]
)
def test_the_header_of_an_affinity(affinity: str | None, header: bytes | None) -> None:
    assert affinity_header(parse({**VLLM, "replicas": 2, "affinity": affinity}).affinity) == header


def test_a_model_called_as_a_replica(refuse: Refuse) -> None:
    """Their logs would be one file."""
    error = refuse({"llmModels": {"m": {**VLLM, "replicas": 2}, "m.1": VLLM}})
    assert (error.code, error.path) == ("invalid_model_id", "llmModels['m.1']")
    assert len(parse_config({"llmModels": {"m": {**VLLM, "replicas": 2}, "m.2": VLLM}}, environ={}).models) == 2


def test_every_address_of_a_list_is_compared(refuse: Refuse) -> None:
    launched = {"command": "vllm", "args": ["serve", "m", "--port", "8001"]}
    remote = listed("http://a", "http://localhost:8001")
    assert refuse({"llmModels": {"a": launched, "b": remote}}).code == "duplicate_upstream"
    assert refuse({"llmModels": {"b": listed("http://a", "http://localhost:8099")}}).code == "upstream_is_gateway"


def test_warnings() -> None:
    def warnings(entry: dict[str, Any]) -> str:
        return "\n".join(parse_config({"llmModels": {"m": entry}}, environ={}).warnings)

    assert "affinity: has no effect without replicas" in warnings({**VLLM, "affinity": "prefix"})
    assert "gpus: has no effect without a command" in warnings({**listed("http://a"), "gpus": [0]})
    assert "--host 0.0.0.0 opens" in warnings({**OTHER, "args": ["--host", "0.0.0.0"], "replicas": 2})
    assert not warnings({**VLLM, "args": ["serve", "m", "--host", "0.0.0.0"], "replicas": 2})
    assert not warnings({**VLLM, "replicas": 2, "affinity": "prefix", "gpus": [0, 1]})
