"""What every test of this room needs: the documents that the FluidMCP documentation shows, and a way to be refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]

DOCUMENTED: dict[str, Any] = {
    "llmModels": {
        "vllm": {
            "command": "vllm",
            "args": [
                "serve", "facebook/opt-125m", "--port", "8001", "--host", "0.0.0.0", "--tensor-parallel-size", "1",
                "--gpu-memory-utilization", "0.9", "--max-model-len", "2048", "--dtype", "float16",
            ],
            "env": {},
            "endpoints": {"base_url": "http://localhost:8001/v1"},
        }
    }
}  # fmt: skip
SHORT: dict[str, Any] = {
    "llmModels": {
        "vllm": {
            "command": "vllm",
            "args": ["serve", "facebook/opt-125m", "--port", "8001"],
            "env": {},
            "endpoints": {"base_url": "http://localhost:8001/v1"},
        }
    }
}
DEPRECATED: dict[str, Any] = {
    "mcpServers": {
        "vllm": {"command": "python", "args": ["vllm_server.py"], "env": {"VLLM_MODEL_NAME": "facebook/opt-125m"}}
    }
}


@pytest.fixture
def documented() -> dict[str, Any]:
    """The documentation's main configuration, free to change."""
    return copy.deepcopy(DOCUMENTED)


@pytest.fixture
def short() -> dict[str, Any]:
    """The documentation's shortest configuration."""
    return copy.deepcopy(SHORT)


@pytest.fixture
def deprecated() -> dict[str, Any]:
    """The documentation's old configuration."""
    return copy.deepcopy(DEPRECATED)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine that runs the tests may change a result."""
    import os

    for name in list(os.environ):
        if name.startswith(("FLUIDMCP_", "VLLM_")):
            monkeypatch.delenv(name)


@pytest.fixture
def refuse() -> Refuse:
    """Parse a document that must be refused and return the error, having checked what holds for every error."""

    def refuse_document(document: Any, environ: Mapping[str, str] | None = None, **overrides: Any) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            parse_config(document, environ=environ or {}, **overrides)
        text = str(caught.value)
        assert text.isprintable(), "one line, nothing a terminal would act on"
        assert caught.value.__cause__ is None, "a chained pydantic error would carry the values"
        assert caught.value.problem
        assert caught.value.remedy
        return caught.value

    return refuse_document
