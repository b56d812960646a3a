"""How to test an app that has models in it, without a GPU: the stub server in the model's place.

`pytest test_host_app.py` starts `fastapi_app.py` with Starlette's TestClient; the stub is launched, supervised and
ended exactly as vLLM would be.
"""

import importlib.util
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

HERE = Path(__file__).parent


@pytest.fixture
def port() -> Iterator[str]:
    """A free port. It is held without listening, so that nobody else is given it before the stub listens there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield str(held.getsockname()[1])


@pytest.fixture
def client(port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    stub = [str(HERE / "stub_server.py"), "serve", "facebook/opt-125m", "--port", port]
    config = tmp_path / "models.json"
    config.write_text(json.dumps({"llmModels": {"vllm": {"command": sys.executable, "args": stub}}}))
    monkeypatch.setenv("FLUIDMCP_CONFIG", str(config))
    monkeypatch.setenv("FLUIDMCP_LOG_DIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("fastapi_app", HERE / "fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with TestClient(module.app) as client:
        yield client


def test_the_apps_own_route(client: TestClient) -> None:
    answer = client.post("/summary", json={"text": "A long story."})
    assert "A long story." in answer.json()["summary"]


def test_the_models_api(client: TestClient) -> None:
    body = {"model": "facebook/opt-125m", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
    answer = client.post("/llm/vllm/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 5
