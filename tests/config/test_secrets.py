"""Expansion of variables, and that nothing secret is ever shown."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.expansion import expand
from fluidmcp_proxy.config.secrets import is_secret_name
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]
SECRET = "hunter2-hunter2"


def document(**more: Any) -> dict[str, Any]:
    return {"llmModels": {"m": {"command": "vllm", "args": ["serve", "m"], **more}}}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("${A}", "1"), ("x${A}y${A}", "x1y1"), ("$${A}", "${A}"), ("$$${A}", "$${A}"), ("$A", "$A"),
        ("$", "$"), ("$$", "$$"),
        ("}{", "}{"), ("${B}", "${A}"), ("${E}", ""), ("", ""), ("$${", "${"),
    ],
)  # fmt: skip
def test_expansion(text: str, result: str) -> None:
    assert expand(text, {"A": "1", "B": "${A}", "E": ""}, path="p", code="c")[0] == result


def test_a_missing_variable_is_named(refuse: Refuse) -> None:
    error = refuse(document(env={"HF_TOKEN": "${HF_TOKEN}"}))
    assert (error.code, error.path) == ("missing_env_variable", "llmModels.m.env.HF_TOKEN")
    assert "'HF_TOKEN'" in error.problem


def test_an_empty_key_is_refused(refuse: Refuse) -> None:
    error = refuse(document(api_key="${KEY}"), {"KEY": ""})
    assert (error.code, error.path) == ("invalid_value", "llmModels.m.api_key")


def test_values_reach_the_model() -> None:
    config = parse_config(document(env={"T": "Bearer ${S}", "P": "x"}, api_key="${S}"), environ={"S": SECRET})
    model = config.models["m"]
    assert dict(model.env) == {"T": f"Bearer {SECRET}", "P": "x"}
    assert model.api_key is not None
    assert model.api_key.get_secret_value() == SECRET
    assert {SECRET, f"Bearer {SECRET}"} == model.secrets


def test_nothing_shows_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"S": SECRET}
    args = ["serve", "m", "--api-key", SECRET]
    config = parse_config(document(args=args, env={"A": "${S}", "B": SECRET}, api_key="${S}"), environ=environ)
    model = config.models["m"]
    logging.getLogger("t").warning("%s %r %s", config, model, config.warnings)
    shown = [str(config), repr(config), str(model), repr(model), repr(model.env), str(config.warnings), caplog.text,
             config.identity, f"{model}", str(config.model_dump(exclude={"models"}))]  # fmt: skip
    assert not [text for text in shown if SECRET in text]
    assert "env" not in model.model_dump()
    assert "secrets" not in model.model_dump()


@pytest.mark.parametrize(
    "broken",
    [
        {"env": {"A_KEY": SECRET, "B": 1}}, {"env": {"A": ["x", SECRET]}}, {"api_key": [SECRET]},
        {"api_key": f"{SECRET} x"},
        {"args": ["--api-key", {"k": SECRET}]}, {"args": SECRET}, {"command": [SECRET]}, {"env": {"A": SECRET + "${"}},
        {"endpoints": {"base_url": f"http://u:{SECRET}@x"}}, {"endpoints": {"base_url": f"http://x?key={SECRET}"}},
        {"endpoints": SECRET}, {"startup_timeout": SECRET}, {"restart_policy": SECRET}, {"readiness_path": SECRET},
        {"extra_paths": [SECRET]}, {"env": {"A": "${NOT_SET}" + SECRET}},
    ],
)  # fmt: skip
def test_no_refusal_shows_a_value(refuse: Refuse, broken: dict[str, Any]) -> None:
    error = refuse(document(**broken))
    for text in (str(error), repr(error), str(error.args), str(error.__context__)):
        assert SECRET not in text


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "VLLM_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "APIKEY",
        "my_token",
    ],
)
def test_names_that_mean_a_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PATH", "MAX_TOKENS", "HOME", "KEYBOARD"])
def test_names_that_do_not(name: str) -> None:
    assert not is_secret_name(name)


def test_what_is_redacted() -> None:
    environ = {
        "HF_TOKEN": "inherited-token",
        "FOO": "inherited-plain",
        "HOME": "/home/somebody",
        "LONG": "long-value",
        "S": "short",
    }
    env = {
        "A_KEY": "abcd",
        "B_KEY": "1",
        "C_KEY": "true",
        "D": "plain-value",
        "E": "${LONG}",
        "F": "${S}",
        "G": "${HOME}/x",
    }
    model = parse_config(document(env=env), environ=environ).models["m"]
    assert model.secrets == {"inherited-token", "abcd", "long-value"}


def test_placeholders_are_not_redacted_but_masked_in_args() -> None:
    model = parse_config(document(args=["serve", "m", "--api-key", "abc"], api_key="EMPTY"), environ={}).models["m"]
    assert model.secrets == frozenset()
    assert model.masked_args == ("serve", "m", "--api-key", "***")
    assert "abc" not in repr(model)


def test_values_are_frozen(short: dict[str, Any]) -> None:
    config = parse_config(short, environ={})
    with pytest.raises(TypeError):
        config.models["x"] = config.models["vllm"]  # type: ignore[index]
    with pytest.raises(TypeError):
        config.models["vllm"].env["x"] = "y"  # type: ignore[index]
    with pytest.raises(ValueError, match="frozen"):
        config.models["vllm"].command = "x"  # type: ignore[misc]


def test_the_document_is_not_kept(short: dict[str, Any]) -> None:
    config = parse_config(short, environ={})
    before = repr(config)
    short["llmModels"]["vllm"]["args"].append("--late")
    short["llmModels"]["vllm"]["env"]["LATE"] = "1"
    assert repr(config) == before


def test_models_can_be_compared_and_copied(short: dict[str, Any]) -> None:
    one, two = (parse_config(short, environ={}).models["vllm"] for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one
    short["llmModels"]["vllm"]["env"] = {"A": "1"}
    assert parse_config(short, environ={}).models["vllm"] != one


def test_identity_of_a_configuration_made_in_code(short: dict[str, Any]) -> None:
    first = parse_config(short, environ={})
    assert first.source is None
    assert first.identity == parse_config(short, environ={}).identity
    short["llmModels"]["vllm"]["env"] = {"A": "1"}
    assert first.identity == parse_config(short, environ={}).identity
    short["llmModels"]["vllm"]["args"][1] = "other"
    assert first.identity != parse_config(short, environ={}).identity
