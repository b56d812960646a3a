"""Every example, run as its first lines say, with the stub server in vLLM's place and free ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fluidmcp_proxy import load_config
from tests.serving import DEADLINE, STUB, answers, eventually, free_port, stub

EXAMPLES = STUB.parent
CONFIGURATIONS = sorted({*EXAMPLES.glob("*.json")} - {EXAMPLES / "grafana-dashboard.json"})
COVERED = {
    "cpu_machine.py": "demo",
    "cpu_model.py": "e2e",
    "demo.py": "here, with the stub",
    "fastapi_app.py": "here",
    "openai_client.py": "here",
    "starlette_middleware.py": "here",
    "stub_server.py": "everywhere",
    "test_host_app.py": "here",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With the stub server as ``vllm`` on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    vllm = programs / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" "$@"\n')
    vllm.chmod(0o755)
    folders = {"FLUIDMCP_LOG_DIR": str(tmp_path / "log"), "FLUIDMCP_RUNTIME_DIR": str(tmp_path / "run")}
    return {**os.environ, **folders, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def on_free_ports(name: str, folder: Path) -> Path:
    """A copy of an example whose models listen on ports that nobody else has."""
    text = (EXAMPLES / name).read_text()
    for port in sorted(set(re.findall(r"localhost:(\d+)", text))):
        text = re.sub(rf"\b{port}\b", str(free_port()), text)
    copy = folder / name
    copy.write_text(text)
    return copy


@contextlib.contextmanager
def process(environment: dict[str, str], *command: str) -> Iterator[None]:
    """A program that is ended by Ctrl-C."""
    running = subprocess.Popen([sys.executable, *command], cwd=EXAMPLES, env=environment)
    try:
        yield
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(DEADLINE)


@contextlib.contextmanager
def run(environment: dict[str, str], config: Path) -> Iterator[int]:
    """The documentation's command; yields the port."""
    port = free_port()
    command = ["run", str(config), "--file", "--start-server", "--port", str(port)]
    with process(environment, "-m", "fluidmcp_proxy", *command):
        eventually(lambda: answers(port, "/ready"), "the models are ready")
        yield port


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(COVERED)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_load_without_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUIDMCP_CONFIG", raising=False)
    assert load_config(path).warnings == ()


def test_the_documentations_configuration_and_requests(environment: dict[str, str], tmp_path: Path) -> None:
    with run(environment, on_free_ports("vllm-config.json", tmp_path)) as port:
        body = {"model": "facebook/opt-125m", "messages": [{"role": "user", "content": "Hello!"}]}
        answer = httpx.post(f"http://127.0.0.1:{port}/vllm/v1/chat/completions", json=body, timeout=DEADLINE)
        assert "Hello!" in answer.json()["choices"][0]["message"]["content"]


def test_the_openai_sdk(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with run(environment, on_free_ports("vllm-config.json", tmp_path)) as port:
        script = [sys.executable, str(EXAMPLES / "openai_client.py"), f"http://127.0.0.1:{port}/vllm/v1"]
        output = subprocess.run(script, capture_output=True, text=True, check=True, timeout=240).stdout
    for said in ("What is Python?", "How do I sort a list in Python?", "Tell me a story."):
        assert said in output


def test_the_model_for_the_cpu(environment: dict[str, str], tmp_path: Path) -> None:
    with run(environment, on_free_ports("cpu-model.json", tmp_path)) as port:
        body = {"model": "smol", "prompt": "Once upon a time"}
        answer = httpx.post(f"http://127.0.0.1:{port}/smol/v1/completions", json=body, timeout=DEADLINE)
        assert "Once upon a time" in answer.json()["choices"][0]["text"]


def test_two_models(environment: dict[str, str], tmp_path: Path) -> None:
    with run(environment, on_free_ports("two-models.json", tmp_path)) as port:
        for model, name in (("chat", "Qwen/Qwen2.5-1.5B-Instruct"), ("embed", "BAAI/bge-small-en-v1.5")):
            listed = httpx.get(f"http://127.0.0.1:{port}/{model}/v1/models", timeout=DEADLINE).json()
            assert listed["data"][0]["id"] == name


def test_servers_run_by_somebody_else(environment: dict[str, str], tmp_path: Path) -> None:
    text = (EXAMPLES / "remote-servers.json").read_text()
    with stub() as upstream:
        config = tmp_path / "remote.json"
        config.write_text(re.sub(r"localhost:\d+", f"localhost:{upstream}", text))
        with run(environment, config) as port:
            for model in load_config(config).models:
                assert httpx.get(f"http://127.0.0.1:{port}/{model}/v1/models", timeout=DEADLINE).status_code == 200


def test_engines(environment: dict[str, str], tmp_path: Path) -> None:
    """The stub as each of them: what the gateway gives it must be enough to find and to name it."""
    names = {"llama-server": "smollm2-gguf", "ollama": "llama3.2:3b", "sglang": None, "transformers": None}
    for program, name in names.items():
        served = f"--served-model-name {name}" if name else ""
        port = '--port "${OLLAMA_HOST##*:}"' if program == "ollama" else ""
        script = tmp_path / "bin" / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" "$@" {served} {port}\n')
        script.chmod(0o755)
    expected = {
        "vllm": "Qwen/Qwen2.5-1.5B-Instruct",
        "sglang": "qwen-small",
        "llamacpp": "smollm2-gguf",
        "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "ollama": "llama3.2:3b",
    }
    with run(environment, on_free_ports("engines.json", tmp_path)) as port_of_gateway:
        for name, served in expected.items():
            body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
            answer = httpx.post(f"http://127.0.0.1:{port_of_gateway}/v1/chat/completions", json=body, timeout=DEADLINE)
            assert answer.json()["model"] == served


def test_fastapi_app(environment: dict[str, str], tmp_path: Path) -> None:
    environment["FLUIDMCP_CONFIG"] = str(on_free_ports("vllm-config.json", tmp_path))
    port = free_port()
    with process(environment, "-m", "uvicorn", "fastapi_app:app", "--port", str(port)):
        eventually(lambda: answers(port, "/llm/ready"), "the model is ready")
        answer = httpx.post(f"http://127.0.0.1:{port}/summary", json={"text": "A long story."}, timeout=DEADLINE)
        assert "A long story." in answer.json()["summary"]


def test_middleware(environment: dict[str, str], tmp_path: Path) -> None:
    environment["FLUIDMCP_CONFIG"] = str(on_free_ports("vllm-config.json", tmp_path))
    port = free_port()
    with process(environment, "-m", "uvicorn", "starlette_middleware:app", "--port", str(port)):
        eventually(lambda: answers(port, "/vllm/v1/models"), "the model is ready")
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=DEADLINE).text.startswith("The models are at")


def test_the_hosts_test(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_host_app.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert "2 passed" in result.stdout, result.stdout


def test_the_tour_with_the_stub(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--stub", "--once", "--port", str(free_port())]
    command += ["--cache", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Answer:" in result.stdout
