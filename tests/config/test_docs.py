"""docs/configuration.md says what the models say: every key, its default, every code."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import fluidmcp_proxy.config
from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.inheritance import KEEP_ALIVE
from fluidmcp_proxy.config.load import TOP_LEVEL
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.options import RESERVED_IDS, EndpointsEntry, ModelEntry
from fluidmcp_proxy.config.settings import GatewaySection, Settings, variable
from fluidmcp_proxy.config.wrapper import ARGUMENTS
from fluidmcp_proxy.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
OF_THE_ENVIRONMENT = {"log_dir": "`$XDG_STATE_HOME/fluidmcp`", "runtime_dir": "`$XDG_RUNTIME_DIR/fluidmcp`"}


def section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert match is not None, title
    return match[1]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def written(default: Any) -> str:
    if default is None:
        return "none"
    plain = default.value if isinstance(default, Enum) else list(default) if isinstance(default, tuple) else default
    return f"`{json.dumps(int(plain) if isinstance(plain, float) and plain.is_integer() else plain)}`"


def test_every_key_of_a_model_with_its_default() -> None:
    table = {row[0].strip("`"): row[1] for row in rows("Keys of a model")}
    nested = {f"endpoints.{name}" for name in EndpointsEntry.model_fields}
    assert set(table) == {*ModelEntry.model_fields, *nested}
    for name, field in ModelEntry.model_fields.items():
        if name == "endpoints":
            continue
        default = ModelConfig.model_fields[name].default if name in ("readiness_path", "start") else field.default
        assert table[name] == written(default), name


def test_every_setting_with_its_variable_and_default() -> None:
    table = {row[1].strip("`"): (row[0].strip("`"), row[2]) for row in rows("Settings")}
    assert set(table) == {variable(name) for name in Settings.model_fields}
    for name, field in GatewaySection.model_fields.items():
        assert table[variable(name)] == (name, OF_THE_ENVIRONMENT.get(name, written(field.default)))


def test_the_top_level() -> None:
    assert {row[0].strip("`") for row in rows("Top level")} == set(TOP_LEVEL)
    assert all(f"`{name}`" in section("Top level") for name in RESERVED_IDS)


def test_every_code() -> None:
    room = Path(fluidmcp_proxy.config.__file__).parent
    source = "\n".join(file.read_text() for file in room.glob("*.py"))
    codes = set(
        re.findall(r'"((?:config|invalid|reserved|missing|duplicate|upstream|unknown|port|no)_[a-z_]+)"', source)
    )
    documented = {row[0].strip("`") for row in rows("Errors")}
    assert documented <= codes
    assert codes - documented <= {"invalid_key"}, "a code that the page does not have (pydantic's own excepted)"


def test_the_examples_load() -> None:
    example = re.search(r"```json\n(\{\n.*?)```", PAGE, re.DOTALL)
    assert example is not None
    assert len(parse_config(json.loads(example[1]), environ={"HF_TOKEN": "x"}).models) == 2


def test_the_example_of_an_error_is_real(short: dict[str, Any]) -> None:
    short["llmModels"]["vllm"]["endpoints"]["base_url"] = "http://localhost:8002/v1"
    with pytest.raises(ConfigError) as caught:
        parse_config(short, source="models.json", environ={})
    assert str(caught.value) in section("Errors").splitlines()


def test_other_facts() -> None:
    assert f"VLLM_HTTP_TIMEOUT_KEEP_ALIVE={KEEP_ALIVE}" in PAGE
    assert all(f"`{name}`" in section("From the JSON-RPC wrapper") for name in ARGUMENTS)
