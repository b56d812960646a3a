"""Keys as they are written: what is kept of them, what is refused, and that none is ever shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from fluidmcp_proxy.config import parse_config
from fluidmcp_proxy.config.checks import check_exposure
from fluidmcp_proxy.config.settings import Settings
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]

SECRET = "kanarie-0123456789"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
MODELS = {name: {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}} for name, port in (("a", 1), ("b", 2))}


def document(**settings: Any) -> dict[str, Any]:
    return {"llmModels": MODELS, "gateway": settings}


def settings(environ: dict[str, str] | None = None, /, **keys: Any) -> Settings:
    return parse_config(document(**keys), environ=environ or {}).settings


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (SECRET, "key-1"),
        ("${SECRET}", "key-1"),
        ({"key": SECRET}, "key-1"),
        ({"name": "alice", "key": "${SECRET}"}, "alice"),
        ({"name": "alice", "key": "${HALF}0123456789"}, "alice"),
        ({"name": "alice", "sha256": DIGEST.upper()}, "alice"),
    ],
)
def test_every_way_to_write_a_key(entry: Any, name: str) -> None:
    read = settings({"SECRET": SECRET, "HALF": "kanarie-"}, api_keys=[entry])
    (key,) = read.api_keys
    assert (key.name, key.sha256, key.models) == (name, DIGEST, None)
    assert SECRET not in f"{read!r} {read} {read.model_dump()}"
    assert DIGEST not in f"{read!r} {read}"


def test_a_dollar_is_written_twice() -> None:
    (key,) = settings(api_keys=["$${x}-0123456789abc"]).api_keys
    assert key.sha256 == hashlib.sha256(b"${x}-0123456789abc").hexdigest()


def test_a_variable_and_an_argument_win_and_are_not_expanded() -> None:
    environ = {"FLUIDMCP_API_KEYS": json.dumps(["${NOTHING}-0123456789"])}
    (key,) = settings(environ, api_keys=["0123456789abcdef"]).api_keys
    assert key.sha256 == hashlib.sha256(b"${NOTHING}-0123456789").hexdigest()
    read = parse_config(document(), environ=environ, api_keys=[{"name": "x", "key": SECRET}], allow_open=True)
    assert [key.name for key in read.settings.api_keys] == ["x"]
    assert read.settings.allow_open


def test_names_by_place() -> None:
    read = settings(api_keys=["0" * 16, {"name": "x", "key": "1" * 16}, "2" * 16], admin_keys=["3" * 16])
    assert [key.name for key in (*read.api_keys, *read.admin_keys)] == ["key-1", "x", "key-3", "admin-1"]


@pytest.mark.parametrize(
    ("entry", "where", "words"),
    [
        ("", "[0]", "shorter than 16"),
        ("0123456789abcde", "[0]", "shorter than 16"),
        ("kanarie 0123456789", "[0]", "spaces"),
        ("kanarie\n0123456789", "[0]", "spaces"),
        ("kanarié-0123456789", "[0]", "spaces"),
        ({"name": "x"}, "[0]", "either key or sha256"),
        ({"key": SECRET, "sha256": DIGEST}, "[0]", "either key or sha256"),
        ({"key": 1234567890123456}, "[0]", "must be a string"),
        ({"key": None}, "[0]", "must be a string"),
        ({"sha256": DIGEST[1:]}, "[0].sha256", "64 hexadecimal digits"),
        ({"sha256": SECRET}, "[0].sha256", "64 hexadecimal digits"),
        ({"sha256": 1}, "[0].sha256", "must be a string"),
        ({"key": SECRET, "name": "a b"}, "[0].name", "characters"),
        ({"key": SECRET, "name": ""}, "[0].name", "characters"),
        ({"key": SECRET, "name": "a\nb"}, "[0].name", "characters"),
        ({"key": SECRET, "name": 1}, "[0].name", "must be a string"),
        ({"key": SECRET, "models": []}, "[0].models", "is empty"),
        ({"key": SECRET, "models": "a"}, "[0].models", "must be a list"),
        ({"key": SECRET, "models": [1]}, "[0].models[0]", "must be a string"),
        ({"key": SECRET, "models": ["a", "nobody"]}, "[0]", "no model 'nobody'"),
        ({SECRET: "alice"}, "[0]", "unknown name"),
        (1, "[0]", "must be an object"),
        (None, "[0]", "must be an object"),
        ("${", "[0]", "${ that is not"),
        ({"key": "${"}, "[0].key", "${ that is not"),
    ],
)
@pytest.mark.parametrize("by", ["file", "variable"])
def test_what_is_no_key(refuse: Refuse, entry: Any, where: str, words: str, by: str) -> None:
    if by == "file":
        error = refuse(document(api_keys=[entry]))
        assert (error.source, error.path) == ("", f"gateway.api_keys{where}")
    elif "${" in words:
        return  # not expanded there
    else:
        error = refuse(document(), {"FLUIDMCP_API_KEYS": json.dumps([entry])})
        assert (error.source, error.path) == ("FLUIDMCP_API_KEYS", where)
    assert error.code == "invalid_value"
    assert words in error.problem
    assert "kanari" not in str(error)
    assert "0123456789" not in str(error)


def test_an_unknown_key_of_an_entry(refuse: Refuse) -> None:
    for source in (document(api_keys=[{"kye": SECRET, "key": SECRET}]), document()):
        error = refuse(source, {"FLUIDMCP_API_KEYS": json.dumps([{"kye": SECRET, "key": SECRET}])})
        assert error.code == "unknown_key"
        assert "'key'" in error.remedy
        assert SECRET not in str(error)


@pytest.mark.parametrize("value", [SECRET, {"alice": SECRET}, None, 1])
def test_what_is_no_list(refuse: Refuse, value: Any) -> None:
    error = refuse(document(api_keys=value))
    assert (error.code, error.path) == ("invalid_value", "gateway.api_keys")
    assert SECRET not in str(error)
    assert SECRET not in str(refuse(document(), {"FLUIDMCP_API_KEYS": f"[{SECRET}]"}))


def test_a_missing_variable(refuse: Refuse) -> None:
    error = refuse(document(api_keys=[{"key": "${NOTHING}"}]))
    assert (error.code, error.path) == ("missing_env_variable", "gateway.api_keys[0].key")
    assert refuse(document(api_keys=["${EMPTY}"]), {"EMPTY": ""}).code == "invalid_value"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"api_keys": [SECRET, SECRET]}, "the same key as 'key-1'"),
        ({"api_keys": [SECRET], "admin_keys": [{"sha256": DIGEST}]}, "the same key as 'key-1'"),
        ({"api_keys": [{"name": "x", "key": SECRET}], "admin_keys": [{"name": "x", "key": "1" * 16}]}, "'x'"),
        ({"api_keys": [SECRET, {"name": "key-1", "key": "1" * 16}]}, "'key-1'"),
        ({"admin_keys": [{"key": SECRET, "models": ["a"]}]}, "every model"),
    ],
)
def test_keys_that_do_not_go_together(refuse: Refuse, keys: Any, words: str) -> None:
    error = refuse(document(**keys))
    assert error.code == "invalid_value"
    assert words in error.problem
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("keys", "is_open"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "127.9.9.9"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "192.168.1.5"}, True),
        ({"host": "gpu.example.com"}, True),
        ({"host": "0.0.0.0", "admin_keys": [SECRET]}, True),
        ({"host": "0.0.0.0", "api_keys": [SECRET]}, False),
        ({"host": "0.0.0.0", "allow_open": True}, False),
    ],
)
def test_exposure(keys: Any, is_open: bool) -> None:
    read = settings(**keys)
    if not is_open:
        check_exposure(read)
        return
    with pytest.raises(ConfigError, match=r"api_keys .*FLUIDMCP_API_KEYS.*--allow-open") as caught:
        check_exposure(read)
    assert (caught.value.code, caught.value.path) == ("invalid_value", "gateway.host")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("LLM.Example.com.", "llm.example.com"), ("*.example.com", "*.example.com"), ("*", "*"),
        ("10.0.0.1", "10.0.0.1"), ("[0:0::1]", "[::1]"), ("a_b", "a_b"),
    ],
)  # fmt: skip
def test_hosts(written: str, read: str) -> None:
    assert settings(allowed_hosts=[written]).allowed_hosts == (read,)


@pytest.mark.parametrize(
    "host", ["", "a:80", "http://a", "a/b", "::1", "[a]", "*a.b", "a.*", "**", ".a", "a..b", "é", "a b"]
)
def test_what_is_no_host(refuse: Refuse, host: str) -> None:
    assert refuse(document(allowed_hosts=[host])).path == "gateway.allowed_hosts[0]"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("https://Chat.example.com/", "https://chat.example.com"), ("https://a:443", "https://a"),
        ("http://a:80", "http://a"), ("http://a:443", "http://a:443"), ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abc", "chrome-extension://abc"), ("*", "*"),
    ],
)  # fmt: skip
def test_origins(written: str, read: str) -> None:
    assert settings(allowed_origins=[written]).allowed_origins == (read,)


@pytest.mark.parametrize("origin", ["", "a", "a.example.com", "https://", "https://a/b", "https://*.a", "null", "//a"])
def test_what_is_no_origin(refuse: Refuse, origin: str) -> None:
    assert refuse(document(allowed_origins=[origin])).path == "gateway.allowed_origins[0]"
