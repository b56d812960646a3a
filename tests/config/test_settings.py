"""The gateway's settings: their sources in order, and every fault in one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluidmcp_proxy.config import configured_path, load_config, parse_config, read_settings
from fluidmcp_proxy.errors import ConfigError

Refuse = Callable[..., ConfigError]


def test_defaults() -> None:
    settings = read_settings(environ={"HOME": "/h"})
    assert settings.model_dump(exclude={"log_dir", "runtime_dir"}) == {
        "config": None,
        "host": "127.0.0.1",
        "port": 8099,
        "api_keys": (),
        "admin_keys": (),
        "allow_open": False,
        "allowed_hosts": (),
        "allowed_origins": (),
        "max_body_bytes": 64 * 1024 * 1024,
        "body_timeout": 60.0,
        "drain_timeout": 30.0,
        "log_level": "info",
        "log_format": "text",
        "tracing": False,
    }
    assert settings.log_dir == Path("/h/.local/state/fluidmcp")
    assert settings.runtime_dir.name == f"fluidmcp-{os.getuid()}"


def test_folders_follow_xdg() -> None:
    settings = read_settings(environ={"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"})
    assert (settings.log_dir, settings.runtime_dir) == (Path("/s/fluidmcp"), Path("/r/fluidmcp"))
    relative = read_settings(environ={"XDG_STATE_HOME": "s", "XDG_RUNTIME_DIR": "r", "TMPDIR": "/t"})
    assert relative.log_dir == Path("~/.local/state/fluidmcp").expanduser()
    assert relative.runtime_dir.name == f"fluidmcp-{os.getuid()}"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    settings = read_settings(environ={})
    assert settings.log_dir == settings.runtime_dir / "logs"


def test_the_order_of_the_sources(short: dict[str, Any]) -> None:
    short["gateway"] = {"port": 1111, "host": "10.0.0.1", "log_level": "debug"}
    environ = {"FLUIDMCP_PORT": "2222", "FLUIDMCP_HOST": "10.0.0.2"}
    settings = parse_config(short, environ=environ, port=3333, log_level=None).settings
    assert (settings.port, settings.host, settings.log_level) == (3333, "10.0.0.2", "debug")


def test_every_variable_is_read() -> None:
    settings = read_settings(
        environ={
            "FLUIDMCP_CONFIG": "/c.json", "FLUIDMCP_HOST": "::1", "FLUIDMCP_PORT": "0", "FLUIDMCP_MAX_BODY_BYTES": "1",
            "FLUIDMCP_BODY_TIMEOUT": "2.5", "FLUIDMCP_DRAIN_TIMEOUT": "1.5", "FLUIDMCP_LOG_LEVEL": "WARNING",
            "FLUIDMCP_LOG_DIR": "/l", "FLUIDMCP_RUNTIME_DIR": "/r", "FLUIDMCP_LOG_FORMAT": "JSON",
            "FLUIDMCP_TRACING": "true",
            "FLUIDMCP_ALLOW_OPEN": "true",
            "FLUIDMCP_API_KEYS": '[{"name": "a", "sha256": "' + "A" * 64 + '", "models": ["m"]}]',
            "FLUIDMCP_ADMIN_KEYS": '[{"sha256": "' + "b" * 64 + '"}]',
            "FLUIDMCP_ALLOWED_HOSTS": '["h"]', "FLUIDMCP_ALLOWED_ORIGINS": '["https://o"]',
        }
    )  # fmt: skip
    assert settings.model_dump() == {
        "config": Path("/c.json"), "host": "::1", "port": 0, "max_body_bytes": 1, "body_timeout": 2.5,
        "drain_timeout": 1.5, "log_level": "warning", "log_format": "json", "tracing": True,
        "log_dir": Path("/l"), "runtime_dir": Path("/r"),
        "allow_open": True, "api_keys": ({"name": "a", "sha256": "a" * 64, "models": ("m",)},),
        "admin_keys": ({"name": "admin-1", "sha256": "b" * 64, "models": None},),
        "allowed_hosts": ("h",), "allowed_origins": ("https://o",),
    }  # fmt: skip


def test_an_empty_variable_counts_as_unset() -> None:
    assert read_settings(environ={"FLUIDMCP_PORT": ""}).port == 8099


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"), ("PORT", "-1"), ("PORT", "65536"), ("PORT", "1.5"), ("MAX_BODY_BYTES", "0"),
        ("DRAIN_TIMEOUT", "nan"), ("BODY_TIMEOUT", "0"),
        ("DRAIN_TIMEOUT", "inf"), ("DRAIN_TIMEOUT", "-1"), ("LOG_LEVEL", "loud"), ("HOST", "a b"), ("HOST", "http://x"),
        ("HOST", "localhost:80"), ("HOST", "[::1]"),
        ("LOG_DIR", "a\0b"), ("LOG_FORMAT", "xml"), ("TRACING", "maybe"),
        ("ALLOW_OPEN", "maybe"), ("ALLOWED_HOSTS", "h"), ("ALLOWED_HOSTS", "{}"),
        ("ALLOWED_ORIGINS", '"https://o"'), ("API_KEYS", "0123456789abcdef"), ("ADMIN_KEYS", "[" * 100_000),
    ],
)  # fmt: skip
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(environ={f"FLUIDMCP_{name}": value})
    assert (caught.value.code, caught.value.source, caught.value.path) == ("invalid_value", f"FLUIDMCP_{name}", "")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "8099"), ("port", True), ("port", 1.5), ("port", -1), ("port", None), ("host", 1), ("host", ""),
        ("max_body_bytes", 0), ("body_timeout", 0), ("drain_timeout", "1"), ("log_level", "INFO"), ("log_level", 1),
        ("log_dir", 1), ("log_dir", ""), ("runtime_dir", "\0"),
    ],
)  # fmt: skip
def test_the_file_is_not_coerced(refuse: Refuse, short: dict[str, Any], name: str, value: Any) -> None:
    short["gateway"] = {name: value}
    error = refuse(short, {f"FLUIDMCP_{name.upper()}": ""})
    assert (error.code, error.path, error.source) == ("invalid_value", f"gateway.{name}", "")


def test_a_bad_section_is_refused_even_where_the_environment_wins(refuse: Refuse, short: dict[str, Any]) -> None:
    short["gateway"] = {"port": "x"}
    assert refuse(short, {"FLUIDMCP_PORT": "1"}).path == "gateway.port"


def test_an_override_is_checked(refuse: Refuse, short: dict[str, Any]) -> None:
    assert refuse(short, port="x").code == "invalid_value"
    with pytest.raises(TypeError, match="prot"):
        parse_config(short, environ={}, prot=1)


@pytest.mark.parametrize("name", ["LOG_FORM", "API_KEY", "PROT"])
def test_a_variable_that_does_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(environ={f"FLUIDMCP_{name}": "hunter22secret"})
    assert caught.value.code == "unknown_key"
    assert f"FLUIDMCP_{name}" in caught.value.problem
    assert "hunter22secret" not in str(caught.value)
    assert "FLUIDMCP_" in caught.value.remedy


def test_what_kubernetes_adds_for_a_service_called_fluidmcp() -> None:
    environ = {
        "FLUIDMCP_PORT": "tcp://10.0.0.1:8099", "FLUIDMCP_SERVICE_HOST": "10.0.0.1", "FLUIDMCP_SERVICE_PORT": "8099",
        "FLUIDMCP_SERVICE_PORT_HTTP": "8099", "FLUIDMCP_PORT_8099_TCP": "tcp://10.0.0.1:8099",
        "FLUIDMCP_PORT_8099_TCP_PROTO": "tcp", "FLUIDMCP_PORT_8099_TCP_PORT": "8099",
        "FLUIDMCP_PORT_8099_TCP_ADDR": "10.0.0.1", "FLUIDMCP_PROXY_PORT": "tcp://10.0.0.1:8099",
        "FLUIDMCP_INTERNAL_MARK": "x",
    }  # fmt: skip
    assert read_settings(environ=environ).port == 8099


def test_relative_folders(tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    short["gateway"] = {"log_dir": "logs", "runtime_dir": "/run/x"}
    Path("conf/m.json").write_text(json.dumps(short))
    settings = load_config("conf/m.json").settings
    assert (settings.log_dir, settings.runtime_dir) == (tmp_path / "conf/logs", Path("/run/x"))
    assert settings.config == tmp_path / "conf/m.json"
    monkeypatch.setenv("FLUIDMCP_LOG_DIR", "here")
    assert load_config("conf/m.json").settings.log_dir == tmp_path / "here"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings(environ={}).port = 1  # type: ignore[misc]


def test_the_configured_path() -> None:
    assert configured_path({"FLUIDMCP_CONFIG": "m.json"}) == "m.json"
    for environ in ({}, {"FLUIDMCP_CONFIG": ""}):
        with pytest.raises(ConfigError) as caught:
            configured_path(environ)
        assert (caught.value.code, caught.value.source) == ("config_not_found", "FLUIDMCP_CONFIG")


def test_the_key_for_another_gateway_is_no_setting() -> None:
    read_settings(environ={"FLUIDMCP_CLIENT_KEY": "kanarie"})
    with pytest.raises(ConfigError) as caught:
        read_settings(environ={"FLUIDMCP_API_KEY": "kanarie"})
    assert "FLUIDMCP_API_KEYS" in str(caught.value)
