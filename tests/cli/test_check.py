"""``fluidmcp check``."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluidmcp_proxy.cli.check import check
from fluidmcp_proxy.process.listener import port_is_free
from tests.serving import free_port

SECRET = "hunter2-hunter2"


MODULE = sys.modules["fluidmcp_proxy.cli.check"]
"""By its name: the package's attribute of that name is the command."""


@pytest.fixture(autouse=True)
def _nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the ports of these files, whatever else this machine runs."""

    async def is_free(host: str, port: int) -> bool:
        return True

    monkeypatch.setattr(MODULE, "port_is_free", is_free)


@pytest.fixture
def run(invoke: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Check a document."""

    def run_check(document: Any, **environ: str) -> Any:
        file = tmp_path / "models.json"
        file.write_text(json.dumps(document))
        return invoke(check, file, **environ)

    return run_check


def program(tmp_path: Path, name: str = "server") -> Path:
    file = tmp_path / name
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_it_shows_each_model_and_its_address(run: Callable[..., Any], tmp_path: Path) -> None:
    program(tmp_path)
    launched = {"command": "server", "args": ["serve", "a b", "--port", "8001"], "env": {"PATH": str(tmp_path)}}
    remote = {"endpoints": {"base_url": "https://host/api/"}}
    result = run({"llmModels": {"one": launched, "two": remote}, "gateway": {"host": "::1", "port": 9000}})
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{tmp_path}/models.json: ok, 2 models",
        "one: http://[::1]:9000/one/v1 -> http://127.0.0.1:8001/v1",
        "  starts server serve 'a b' --port 8001",
        "two: http://[::1]:9000/two/v1 -> https://host:443/api/v1",
        "  forwards only: someone else runs the server",
    ]


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ({"command": "vllm", "args": ["serve", "m"]}, "a Unix socket of the gateway's choice"),
        ({"command": "vllm", "args": ["serve", "m", "--uds", "/s"]}, "unix:/s"),
        ({"command": "vllm", "args": ["serve", "m"], "replicas": 2}, "2 Unix sockets of its choice"),
        ({"command": "llama-server", "replicas": 3}, "3 ports of its choice"),
        ({"endpoints": [{"base_url": "http://a"}, {"base_url": "http://b"}]}, "http://a:80/v1, http://b:80/v1"),
    ],
)
def test_addresses(run: Callable[..., Any], entry: dict[str, Any], shown: str) -> None:
    assert f"m: http://127.0.0.1:8099/m/v1 -> {shown}\n" in run({"llmModels": {"m": entry}}).stdout


def test_warnings_do_not_fail_it_and_show_no_secret(run: Callable[..., Any], tmp_path: Path) -> None:
    args = ["serve", "m", "--host", "0.0.0.0", "--api-key", SECRET]
    entry = {"command": str(program(tmp_path)), "args": ["vllm", *args, "--port", "8001"], "env": {"A_KEY": "${K}"}}
    result = run({"llmModels": {"m": entry}}, K=SECRET + "2")
    assert result.exit_code == 0
    assert result.stdout.count("warning: ") == 2
    assert SECRET not in result.output


@pytest.mark.parametrize(
    ("command", "why"), [("no-such-program-x", "not on PATH"), ("/no/such/program", "there is no such program")]
)
def test_a_missing_program_is_told(run: Callable[..., Any], tmp_path: Path, command: str, why: str) -> None:
    result = run({"llmModels": {"m": {"command": command, "args": ["--port", "8001"]}}})
    assert result.exit_code == 0
    assert f"warning: llmModels.m.command: {why}" in result.stdout


def test_the_models_own_path_counts(run: Callable[..., Any], tmp_path: Path) -> None:
    program(tmp_path, "only-here")
    entry = {"command": "only-here", "args": ["--port", "8001"], "env": {"PATH": str(tmp_path)}}
    assert "warning" not in run({"llmModels": {"m": entry}}).output


@pytest.mark.parametrize(
    ("document", "code"),
    [([], "config_invalid_type"), ({}, "no_models"), ({"llmModels": {"m": {"api_key": [SECRET]}}}, "invalid_value")],
)
def test_a_bad_file_is_one_line_and_exit_code_2(
    run: Callable[..., Any], tmp_path: Path, document: Any, code: str
) -> None:
    result = run(document)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{code}: {tmp_path}/models.json: ")
    assert result.stderr.count("\n") == 1
    assert SECRET not in result.stderr


def test_the_file_of_the_environment(invoke: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"llmModels": {"m": {"endpoints": {"base_url": "http://x"}}}}')
    found = invoke(check, FLUIDMCP_CONFIG=str(file))
    assert found.exit_code == 0
    missing = invoke(check)
    assert missing.exit_code == 2
    assert missing.stderr.startswith("config_not_found: FLUIDMCP_CONFIG: ")


def test_a_bad_setting_names_its_variable(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run({"llmModels": {"m": {"endpoints": {"base_url": "http://x"}}}}, FLUIDMCP_PORT="x")
    assert result.exit_code == 2
    assert result.stderr.startswith("invalid_value: FLUIDMCP_PORT: ")


def test_a_terminal_that_knows_only_ascii(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = SimpleNamespace(stdout=SimpleNamespace(encoding="ascii"))
    monkeypatch.setattr(MODULE, "sys", terminal)
    entry = {"command": str(program(tmp_path)), "args": ["mödel\x1b[2J\n", "--port", "8001"]}
    result = run({"llmModels": {"m": entry}})
    assert result.exit_code == 0
    assert r"m\xf6del\x1b[2J\n" in result.stdout


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({}, 2),
        ({"FLUIDMCP_ALLOW_OPEN": "true"}, 0),
        ({"FLUIDMCP_API_KEYS": f'[{{"name": "alice", "key": "{SECRET}-0123456789abcdef"}}]'}, 0),
        ({"FLUIDMCP_HOST": "127.0.0.1"}, 0),
    ],
)
def test_an_address_that_others_can_reach_without_keys(
    tmp_path: Path, invoke: Callable[..., Any], variables: dict[str, str], code: int
) -> None:
    file = tmp_path / "models.json"
    models = {"m": {"endpoints": {"base_url": "http://127.0.0.1:1/v1"}}}
    file.write_text(json.dumps({"llmModels": models, "gateway": {"host": "0.0.0.0"}}))
    outcome = invoke(check, file, **variables)
    assert outcome.exit_code == code, outcome.output
    assert SECRET not in outcome.output
    if code:
        assert outcome.stderr.startswith("invalid_value: gateway.host: 0.0.0.0 can be reached from elsewhere")
        assert "--allow-open" in outcome.stderr


def test_a_port_that_is_taken(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "port_is_free", port_is_free)
    program(tmp_path)
    taken, gateways = free_port(), free_port()
    with socket.create_server(("127.0.0.1", taken)), socket.create_server(("127.0.0.1", gateways)):
        model = {"command": "server", "args": ["--port", str(taken)], "env": {"PATH": str(tmp_path)}}
        document = {"llmModels": {"m": model}, "gateway": {"port": gateways}}
        result = run(document)
    assert result.exit_code == 0
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" is taken")[0] for line in warnings] == [
        f"warning: port {gateways} of 127.0.0.1",
        f"warning: llmModels.m: port {taken}",
    ]
    assert "is taken;" not in run(document).stdout


def test_a_gpu_without_room(run: Callable[..., Any]) -> None:
    models = {name: {"command": "vllm", "args": ["serve", name]} for name in ("a", "b")}
    assert "warning: GPU 0: a 0.9, b 0.9: together 1.8 of its memory" in run({"llmModels": models}).stdout
