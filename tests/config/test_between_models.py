"""What must hold between models and towards the gateway, and what is warned about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]


def launched(port: int = 8001, **more: Any) -> dict[str, Any]:
    return {"command": "vllm", "args": ["serve", "m", "--port", str(port)], **more}


def remote(url: str) -> dict[str, Any]:
    return {"endpoints": {"base_url": url}}


def models(**entries: Any) -> dict[str, Any]:
    return {"llmModels": entries}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0.0.0.0", "LOCALHOST", "localhost."])
def test_two_models_on_one_address(refuse: Refuse, host: str) -> None:
    for first, second in (
        (launched(), remote(f"http://{host}:8001/v1")),
        (remote(f"http://{host}:8001/api"), launched()),
        (launched(), launched(endpoints={"base_url": f"http://{host}:8001"})),
    ):
        error = refuse(models(a=first, b=second))
        assert (error.code, error.path) == ("duplicate_upstream", "llmModels.b.endpoints.base_url")
        assert "'a'" in error.problem


def test_vllms_default_port_collides_too(refuse: Refuse) -> None:
    entry = {"command": "vllm", "args": ["serve", "m"], "verify_listener": False}
    assert refuse(models(a=entry, b=entry)).code == "duplicate_upstream"


def test_sockets_collide(refuse: Refuse) -> None:
    def on(path: str) -> dict[str, Any]:
        return {"command": "vllm", "args": ["serve", "m", "--uds", path]}

    error = refuse(models(a=on("/run/s"), b=on("/run//s")))
    assert (error.code, error.path) == ("duplicate_upstream", "llmModels.b.args[2]")
    assert "(socket /run/s)" in error.problem
    assert len(parse_config(models(a=on("/run/s"), b=on("/run/t"), c=launched(80)), environ={}).models) == 3


def test_a_socket_of_its_own_for_each() -> None:
    entry = {"command": "vllm", "args": ["serve", "m"]}
    assert len(parse_config(models(a=entry, b=entry), environ={}).models) == 2


def test_a_server_of_someone_else_may_serve_many_models() -> None:
    config = parse_config(models(a=remote("http://localhost:11434"), b=remote("http://localhost:11434")), environ={})
    assert list(config.models) == ["a", "b"]


def test_a_third_model_finds_the_launched_one(refuse: Refuse) -> None:
    url = "http://localhost:8001"
    assert refuse(models(a=remote(url), b=remote(url), c=launched())).path == "llmModels.c.endpoints.base_url"


def test_different_hosts_are_different() -> None:
    entries = models(a=launched(), b=remote("http://10.0.0.1:8001"), c=remote("http://example:8001"))
    assert len(parse_config(entries, environ={}).models) == 3


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("http://localhost:8099", {}),
        ("http://[::1]:8099/v1", {}),
        ("http://localhost:8099/llm", {"host": "0.0.0.0"}),
        ("http://10.0.0.1:80", {"host": "10.0.0.1", "port": 80}),
        ("http://localhost:9000", {"port": 9000}),
    ],
)
def test_the_gateway_must_not_call_itself(refuse: Refuse, url: str, settings: dict[str, Any]) -> None:
    error = refuse(models(m=remote(url)), **settings)
    assert (error.code, error.path) == ("upstream_is_gateway", "llmModels.m.endpoints.base_url")


def test_a_launched_server_on_the_gateways_port(refuse: Refuse) -> None:
    assert refuse(models(m=launched(8099))).code == "upstream_is_gateway"


def test_the_gateways_port_on_another_machine_is_fine() -> None:
    assert parse_config(models(m=remote("http://10.0.0.1:8099")), environ={}).models


@pytest.mark.parametrize(
    ("first", "second", "path", "said"),
    [
        (["b"], [], "llmModels.a.aliases[0]", "'b' is the id of model 'b'"),
        (["x", "a"], [], "llmModels.a.aliases[1]", "'a' is the id of model 'a'"),
        (["x"], ["y", "x"], "llmModels.b.aliases[1]", "'x' is an alias of model 'a' already"),
        (["x", "x"], [], "llmModels.a.aliases[1]", "'x' is an alias of model 'a' already"),
        ([], ["models"], "llmModels.b.aliases[0]", "'models' is a path of the gateway"),
    ],
)
def test_an_alias_names_one_model(refuse: Refuse, first: list[str], second: list[str], path: str, said: str) -> None:
    error = refuse(models(a=launched(aliases=first), b=launched(8002, aliases=second)))
    assert (error.code, error.path, error.problem) == ("invalid_value", path, said)


@pytest.mark.parametrize("alias", ["", " a", "a b", "/a", "a/", "a//b", "a/../b", "ä", "a?b", "a" * 257, 1, None])
def test_what_cannot_be_an_alias(refuse: Refuse, alias: Any) -> None:
    error = refuse(models(a=launched(aliases=["fine", alias])))
    assert (error.code, error.path) == ("invalid_value", "llmModels.a.aliases[1]")


def test_aliases() -> None:
    names = ["gpt-4o", "meta-llama/Llama-3.1-8B:main", "llama3:8b", "a" * 256]
    assert parse_config(models(a=launched(aliases=names)), environ={}).models["a"].aliases == tuple(names)


def warnings(document: dict[str, Any], environ: dict[str, str] | None = None) -> tuple[str, ...]:
    found = parse_config(document, environ=environ or {}).warnings
    assert all(warning.isprintable() for warning in found)
    return found


def test_a_plain_configuration_has_no_warnings(short: dict[str, Any]) -> None:
    assert warnings(short) == ()


def test_the_documented_host_is_warned_about(documented: dict[str, Any]) -> None:
    (warning,) = warnings(documented)
    assert warning.startswith("llmModels.vllm.args[4]: --host 0.0.0.0")


@pytest.mark.parametrize("host", ["::", "[::]", "0.0.0.0"])
def test_every_wildcard_is_warned_about(host: str) -> None:
    entry = launched()
    entry["args"] += ["--host", host]
    (warning,) = warnings(models(m=entry))
    assert warning.startswith(f"llmModels.m.args[4]: --host {host} opens")


@pytest.mark.parametrize(
    ("args", "index"),
    [
        (["--api-key", "my-own-key-1"], 4),
        (["--api-key=my-own-key-1"], 4),
        (["--api_key", "my-own-key-1"], 4),
        (["--hf-token", "my-own-key-1"], 4),
        (["--note", "hf_abcdefghijklmnopqrstuvwxyz012345"], 5),
        (["--note=sk-abcdefghijklmnopqrstuvwxyz012345"], 4),
    ],
)
def test_a_secret_in_args(args: list[str], index: int) -> None:
    entry = launched()
    entry["args"] += args
    config = parse_config(models(m=entry), environ={})
    (warning,) = config.warnings
    secret = args[-1].rpartition("=")[2]
    assert warning.startswith(f"llmModels.m.args[{index}]: a secret")
    assert secret not in warning
    assert secret in config.models["m"].secrets
    assert secret not in repr(config)


@pytest.mark.parametrize("value", ["1", "true", "2"])
def test_the_development_mode(value: str) -> None:
    (inside,) = warnings(models(m=launched(env={"VLLM_SERVER_DEV_MODE": value})))
    assert inside.startswith("llmModels.m.env.VLLM_SERVER_DEV_MODE: ")
    (outside,) = warnings(models(m=launched()), {"VLLM_SERVER_DEV_MODE": value})
    assert outside.startswith("llmModels.m: ")
    assert warnings(models(m=launched(env={"VLLM_SERVER_DEV_MODE": "0"})), {"VLLM_SERVER_DEV_MODE": value}) == ()
    able = ["serve", "m", "--port", "8001", "--enable-sleep-mode"]
    assert warnings(models(m=launched(args=able, sleep=1)), {"VLLM_SERVER_DEV_MODE": value}) == ()


@pytest.mark.parametrize(
    ("host", "url", "warned"),
    [
        ("127.0.0.1", "http://10.0.0.1:8001", True),
        ("10.0.0.1", "http://localhost:8001", True),
        ("10.0.0.1", "http://10.0.0.1:8001", False),
        ("127.0.0.1", "http://localhost:8001", False),
        ("node-1", "http://localhost:8001", False),
        ("127.0.0.1", "http://node-1:8001", False),
    ],
)
def test_a_server_that_listens_elsewhere(host: str, url: str, warned: bool) -> None:
    entry = launched(endpoints={"base_url": url})
    entry["args"] += ["--host", host]
    assert len(warnings(models(m=entry))) == warned


@pytest.mark.parametrize(
    "argument", ["hf_transfer", "org/sk-model-name", "--load-format=hf_transfer", "task-sk-abcdefg"]
)
def test_what_only_looks_like_a_key(argument: str) -> None:
    entry = launched()
    entry["args"] += ["--x", argument]
    assert warnings(models(m=entry)) == ()


def test_a_reference_in_args_is_not_expanded() -> None:
    entry = launched()
    entry["args"] += ["--download-dir", "${CACHE}"]
    (warning,) = warnings(models(m=entry))
    assert warning.startswith("llmModels.m.args[5]: ")


def test_what_a_model_without_a_command_cannot_use() -> None:
    entry = {**remote("http://x"), "env": {"A": "1"}, "stop_timeout": 5, "start": "on_demand", "group": "g"}
    assert [warning.split(":")[0] for warning in warnings(models(m=entry))] == [
        "llmModels.m.env",
        "llmModels.m.start",
        "llmModels.m.group",
        "llmModels.m.stop_timeout",
    ]


def test_the_deprecated_wrapper_beside_models(short: dict[str, Any], deprecated: dict[str, Any]) -> None:
    deprecated["mcpServers"]["vllm"]["env"]["HF_TOKEN"] = "hf_supersecret"
    (warning,) = warnings({**short, **deprecated})
    assert warning.startswith("mcpServers.vllm: ")
    assert '"args": ["serve", "facebook/opt-125m", "--port", "8002"]' in warning
    assert "HF_TOKEN" in warning
    assert "hf_supersecret" not in warning


def test_the_deprecated_wrapper_alone(refuse: Refuse, deprecated: dict[str, Any]) -> None:
    error = refuse(deprecated)
    assert error.code == "no_models"
    assert '"args": ["serve", "facebook/opt-125m", "--port", "8001"]' in error.remedy


def test_other_servers_are_none_of_our_business(short: dict[str, Any]) -> None:
    servers: dict[str, Any] = {
        "a": {"command": "npx", "env": {"KEY": 1}},
        "b": None,
        "c": [],
        "d": {"args": 5, "anything": {}},
    }
    assert warnings({**short, "mcpServers": servers}) == ()
