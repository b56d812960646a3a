"""What is read out of a server's command line."""

from __future__ import annotations

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.arguments import read_arguments


@pytest.mark.parametrize(
    ("args", "port"),
    [
        (["serve", "m", "--port", "8001"], 8001),
        (["serve", "m", "--port=8001"], 8001),
        (["serve", "m", "--port", "1", "--port", "2"], 2),
        (["serve", "m", "--port=1", "--port", "2"], 2),
        (["serve", "m", "--port", "08001"], 8001),
    ],
)
def test_the_port_of_vllm(args: list[str], port: int) -> None:
    endpoint = parse_config({"llmModels": {"m": {"command": "vllm", "args": args}}}, environ={}).models["m"].endpoint
    assert endpoint is not None
    assert (endpoint.host, endpoint.port) == ("127.0.0.1", port)


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("vllm", ["serve", "m"]),
        ("/opt/venv/bin/vllm", ["serve", "m"]),
        ("python3", ["-m", "vllm.entrypoints.openai.api_server", "--model", "m"]),
        ("python3", ["-u", "-m", "vllm.entrypoints.cli.main", "serve", "m"]),
        ("uv", ["run", "vllm", "serve", "m"]),
        ("numactl", ["-N", "0", "vllm", "serve", "m"]),
    ],
)
def test_vllm_is_recognised(command: str, args: list[str]) -> None:
    read = read_arguments(command, args)
    assert (read.is_vllm, read.default_port, read.served_names) == (True, 8000, ("m",))


@pytest.mark.parametrize(("command", "args"), [("vllm", ["bench"]), ("llama-server", []), ("python", ["serve.py"])])
def test_others_are_not(command: str, args: list[str]) -> None:
    read = read_arguments(command, args)
    assert (read.is_vllm, read.default_port, read.served_names) == (False, None, ())


@pytest.mark.parametrize(
    ("args", "model"),
    [
        (["serve", "org/m"], "org/m"),
        (["serve", "--port", "8001", "org/m"], "org/m"),
        (["serve", "--enforce-eager", "org/m", "--port", "1"], "org/m"),
        (["serve", "--enable_prefix_caching", "org/m"], "org/m"),
        (["serve", "--port=8001", "org/m"], "org/m"),
        (["serve", "--model", "org/m"], "org/m"),
        (["serve", "--model=org/m"], "org/m"),
        (["serve"], None),
        (["serve", "--port", "8001"], None),
    ],
)
def test_the_model_argument(args: list[str], model: str | None) -> None:
    assert read_arguments("vllm", args).served_names == (() if model is None else (model,))


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["serve", "m", "--served-model-name", "a", "b", "--port", "1"], ("a", "b")),
        (["serve", "m", "--served-model-name=a"], ("a",)),
        (["serve", "m", "--served_model_name", "a"], ("a",)),
        (["serve", "m", "--served_model_name=a"], ("a",)),
        (["serve", "m", "--served-model-name"], ("m",)),
        (["serve", "m", "--served-model-name", "a", "--served-model-name", "b"], ("b",)),
    ],
)
def test_served_names(args: list[str], names: tuple[str, ...]) -> None:
    assert read_arguments("vllm", args).served_names == names


@pytest.mark.parametrize(
    ("command", "args", "names"),
    [
        ("llama-server", ["--model", "/models/m.gguf"], ("m.gguf",)),
        ("/opt/llama.cpp/llama-server", ["--model=m.gguf", "--alias", "m"], ("m",)),
        ("llama-server", ["-m", "m.gguf", "--alias", "a, b,"], ("a", "b")),
        ("llama-server", ["-m", "/models/m.gguf"], ()),  # its list will tell
        ("numactl", ["-N", "0", "llama-server", "--model", "/models/m.gguf"], ("m.gguf",)),
        ("docker", ["run", "--name", "llama-server", "i", "--model", "org/m"], ("org/m",)),
        ("other", ["--model", "/models/m", "--alias", "a"], ("/models/m",)),
        ("python3", ["-m", "sglang.launch_server", "--model-path", "org/m"], ("org/m",)),
        ("python3", ["-m", "sglang.launch_server", "--model-path", "m", "--served-model-name", "a"], ("a",)),
        ("sglang", ["serve", "--model-path", "org/m", "--port", "1"], ("org/m",)),
        ("transformers", ["serve", "org/m"], ("org/m",)),
        ("/venv/bin/transformers", ["serve", "--continuous-batching", "--device", "cpu", "/m"], ("/m",)),
        ("transformers", ["serve", "--port", "1"], ()),
        ("ollama", ["serve"], ()),
    ],
)
def test_the_names_that_other_engines_serve(command: str, args: list[str], names: tuple[str, ...]) -> None:
    read = read_arguments(command, args)
    assert (read.is_vllm, read.takes_a_socket, read.served_names) == (False, False, names)
    entry = {"command": command, "args": args, "endpoints": {"base_url": "http://localhost:1"}}
    assert parse_config({"llmModels": {"m": entry}}, environ={}).models["m"].served_names == names


def test_a_double_dash_ends_the_options() -> None:
    assert read_arguments("vllm", ["serve", "m", "--", "--port", "1"]).port is None


def test_a_double_dash_of_a_launcher_does_not() -> None:
    read = read_arguments("uv", ["run", "--port", "1", "--", "vllm", "serve", "m", "--served-model-name", "a"])
    assert (read.port, read.served_names) == (None, ("a",))
    read = read_arguments("uv", ["run", "--", "vllm", "serve", "m", "--port", "2"])
    assert read.port is not None
    assert (read.port.index, read.port.value) == (5, "2")


@pytest.mark.parametrize("args", [["serve", "m"], ["serve", "m", "--host", "127.0.0.1"]])
def test_a_vllm_without_a_port_has_a_socket_of_the_gateway_s(args: list[str]) -> None:
    config = parse_config({"llmModels": {"m": {"command": "vllm", "args": args}}}, environ={})
    assert config.models["m"].endpoint is None
    assert not config.warnings


def test_one_that_is_not_the_gateway_s_child_cannot_be_given_a_socket() -> None:
    entry = {"command": "docker", "args": ["run", "i", "vllm", "serve", "m"], "verify_listener": False}
    endpoint = parse_config({"llmModels": {"m": entry}}, environ={}).models["m"].endpoint
    assert endpoint is not None
    assert (endpoint.host, endpoint.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("args", [["--uds", "/run/s"], ["--uds=/run/s"], ["--uds", "/run/s", "--host", "0.0.0.0"]])
@pytest.mark.parametrize("command", ["vllm", "other"])
def test_a_socket_that_was_written(command: str, args: list[str]) -> None:
    entry = {"command": command, "args": ["serve", "m", *args]}
    config = parse_config({"llmModels": {"m": entry}}, environ={})
    endpoint = config.models["m"].endpoint
    assert endpoint is not None
    assert (endpoint.host, endpoint.port, endpoint.root, endpoint.uds) == ("localhost", 80, "", "/run/s")
    assert not config.warnings  # --host opens nothing


def test_the_address_of_a_server_that_maps_its_socket() -> None:
    entry = {
        "command": "docker",
        "args": ["run", "i", "vllm", "serve", "m", "--uds", "/s"],
        "verify_listener": False,
        "endpoints": {"base_url": "http://localhost:8005"},
    }
    endpoint = parse_config({"llmModels": {"m": entry}}, environ={}).models["m"].endpoint
    assert endpoint is not None
    assert (endpoint.port, endpoint.uds) == (8005, None)


def test_a_port_that_a_launcher_maps() -> None:
    entry = {
        "command": "docker",
        "args": ["run", "-p", "8005:8000", "vllm/vllm-openai", "--model", "m", "--port", "8000"],
        "endpoints": {"base_url": "http://localhost:8005/v1"},
        "verify_listener": False,
    }
    config = parse_config({"llmModels": {"m": entry}}, environ={})
    assert config.models["m"].endpoint is not None
    assert config.models["m"].endpoint.port == 8005
    assert any("verify_listener" in warning for warning in config.warnings)


def test_anothers_port_option_may_mean_something_else() -> None:
    entry = {"command": "serve", "args": ["--port", "auto"], "endpoints": {"base_url": "http://localhost:9"}}
    assert parse_config({"llmModels": {"m": entry}}, environ={}).models["m"].endpoint is not None


def test_a_vllm_config_file_may_set_the_port() -> None:
    entry = {
        "command": "vllm",
        "args": ["serve", "--config", "c.yaml"],
        "endpoints": {"base_url": "http://localhost:9"},
    }
    assert parse_config({"llmModels": {"m": entry}}, environ={}).models["m"].endpoint is not None
