"""Documents that nobody thought of: they load or raise ``ConfigError``, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fluidmcp_proxy.config import GatewayConfig, load_config, parse_config
from fluidmcp_proxy.config.document import parse_document
from fluidmcp_proxy.config.migrate import migrate
from fluidmcp_proxy.errors import ConfigError

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(st.characters(), max_size=12)
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_MODEL_KEYS = st.sampled_from(
    [
        "command",
        "args",
        "env",
        "endpoints",
        "base_url",
        "api_key",
        "aliases",
        "extra_paths",
        "readiness_path",
        "startup_timeout",
        "x",
    ]
)
_ENTRY = st.dictionaries(
    _MODEL_KEYS, _JSON | st.lists(st.sampled_from(["serve", "--port", "--host", "8001", "--", "="]))
)
_SETTINGS = st.sampled_from(
    ["host", "port", "log_dir", "log_level", "api_keys", "admin_keys", "allow_open", "allowed_hosts", "allowed_origins"]
)
_KEY = st.text() | st.dictionaries(st.sampled_from(["name", "key", "sha256", "models", "x"]), _JSON)
_DOCUMENT = st.fixed_dictionaries(
    {},
    optional={
        "llmModels": st.dictionaries(st.sampled_from(["a", "b", "v1", "\n"]), _ENTRY | _JSON, max_size=2) | _JSON,
        "gateway": st.dictionaries(_SETTINGS, _JSON | st.lists(_KEY)) | _JSON,
        "mcpServers": st.dictionaries(
            st.text(max_size=4), st.dictionaries(st.sampled_from(["command", "args", "env"]), _JSON) | _JSON
        )
        | _JSON,
    },
)
VALID: dict[str, Any] = {
    "$schema": "s",
    "llmModels": {
        "vllm": {
            "command": "vllm",
            "args": ["serve", "m", "--port", "8001", "--host", "127.0.0.1"],
            "env": {"HF_TOKEN": "${HF_TOKEN}", "A": "$${A}"},
            "endpoints": {"base_url": "http://localhost:8001/v1"},
            "startup_timeout": 900, "stop_timeout": 30, "restart_policy": "on-failure", "max_restarts": 3,
            "restart_delay": 1, "readiness_path": "/health", "verify_listener": True, "queue_timeout": 600,
            "connect_timeout": 5, "first_byte_timeout": 1.5, "stream_idle_timeout": None, "extra_paths": ["/x/*"],
            "api_key": "${HF_TOKEN}",
        },
        "remote": {"endpoints": {"base_url": "https://example/api/v1"}},
    },
    "gateway": {"host": "127.0.0.1", "port": 8099, "max_body_bytes": 1, "body_timeout": 1, "drain_timeout": 1,
                "log_level": "info", "log_dir": "l", "runtime_dir": "/r"},
    "mcpServers": {"old": {"command": "python", "args": ["vllm_server.py"], "env": {"VLLM_MODEL_NAME": "m"}}},
}  # fmt: skip
ENVIRON = {"HF_TOKEN": "hunter2-hunter2", "HOME": "/h"}


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every scalar and every container."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def outcome(document: Any) -> GatewayConfig | ConfigError:
    try:
        config = parse_config(document, environ=ENVIRON)
    except ConfigError as error:
        refusal = error
    else:
        check_loaded(config)
        return config
    assert str(refusal).isprintable()
    assert "hunter2-hunter2" not in str(refusal)
    assert refusal.code
    assert refusal.remedy
    return refusal


def check_loaded(config: GatewayConfig) -> None:
    assert "hunter2-hunter2" not in repr(config)
    assert all(warning.isprintable() for warning in config.warnings)
    assert config.identity


def test_the_valid_document_is_valid() -> None:
    assert isinstance(outcome(VALID), GatewayConfig)


@settings(max_examples=300)
@given(_JSON | _DOCUMENT)
@example({"llmModels": {"a": {"command": "vllm", "startup_timeout": 10**400}}})
@example({"llmModels": {"a": {"endpoints": {"base_url": "http://[v1.x]"}}}})
def test_any_document_loads_or_is_refused(document: Any) -> None:
    outcome(document)


@settings(max_examples=300)
@given(st.sampled_from(sorted(leaves(VALID), key=str)), _JSON)
def test_a_valid_document_with_one_change(path: tuple[str | int, ...], value: Any) -> None:
    document = copy.deepcopy(VALID)
    place = document
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    outcome(document)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text('{}[]",:\\ntruefalsn0123.eE-+NaIfiy \n', max_size=40).map(str.encode))
def test_any_bytes_parse_or_are_refused(content: bytes) -> None:
    try:
        result: dict[str, Any] | ConfigError = parse_document(content)
    except ConfigError as error:
        result = error
    if isinstance(result, ConfigError):
        assert str(result).isprintable()
        assert result.code.startswith("config_")
    else:
        assert isinstance(result, dict)


@settings(max_examples=150)
@given(_DOCUMENT)
def test_any_document_migrates(document: dict[str, Any]) -> None:
    migration = migrate(document)
    again = json.loads(migration.text)
    assert again.keys() == migration.document.keys()
    assert not migrate(migration.document).changes


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_DOCUMENT)
def test_a_file_and_its_document_agree(tmp_path: Path, document: dict[str, Any]) -> None:
    file = tmp_path / "models.json"
    text = json.dumps(document)
    if any(constant in text for constant in ("NaN", "Infinity")):
        return
    file.write_text(text)
    code: str | None = None
    with contextlib.suppress(ConfigError):
        load_config(file)
        code = "loaded"
    assert (code == "loaded") == isinstance(outcome(json.loads(text)), GatewayConfig)


@pytest.mark.parametrize("depth", [500, 50_000])
def test_a_deep_document_made_in_code(depth: int) -> None:
    document: dict[str, Any] = {}
    for _ in range(depth):
        document = {"llmModels": document}
    with pytest.raises(ConfigError):
        parse_config(document, environ={})
