"""The file as such: found, regular, small, UTF-8, JSON, no key twice."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fluidmcp_proxy.config import load_config
from fluidmcp_proxy.config.document import MAX_BYTES
from fluidmcp_proxy.errors import ConfigError


def refused(path: Path | str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).isprintable()
    return caught.value


def refused_content(tmp_path: Path, content: bytes) -> ConfigError:
    file = tmp_path / "models.json"
    file.write_bytes(content)
    error = refused(file)
    assert error.source == str(file)
    assert error.remedy
    return error


def test_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("", "missing.json", "file/models.json", "dangling", "loop", "x" * 300, "a\0b"):
        error = refused(f"{tmp_path}/{path}" if path else "")
        assert error.code == "config_not_found", path
        assert error.remedy


def test_an_odd_name_stays_on_one_line(tmp_path: Path) -> None:
    assert "a\\nb" in str(refused(tmp_path / "a\nb"))


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        error = refused(path)
        assert error.code == "config_not_file", path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_not_readable(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    file.touch(0o000)
    assert refused(file).code == "config_not_file"


def test_an_unreadable_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "models.json"
    file.touch()
    monkeypatch.setattr(os, "open", refuse)
    error = refused(file)
    assert error.code == "config_not_file"
    assert "Permission denied" in error.problem


def test_too_large(tmp_path: Path, short: dict[str, Any]) -> None:
    text = json.dumps(short).encode()
    (tmp_path / "largest.json").write_bytes(text + b" " * (MAX_BYTES - len(text)))
    assert load_config(tmp_path / "largest.json").models
    assert refused_content(tmp_path, text + b" " * (MAX_BYTES - len(text) + 1)).code == "config_too_large"


def test_a_byte_order_mark_is_fine(tmp_path: Path, short: dict[str, Any]) -> None:
    file = tmp_path / "models.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(short).encode())
    assert load_config(file).models


@pytest.mark.parametrize(
    ("content", "where"),
    [(b'{\n  "a": "\xff"}', "2:9"), (b"\xff\xfe{\x00}\x00", "1:1"), ('{"ä": "'.encode() + b"\xc3", "1:8")],
)
def test_other_encodings(tmp_path: Path, content: bytes, where: str) -> None:
    error = refused_content(tmp_path, content)
    assert (error.code, error.path) == ("config_invalid_encoding", where)


@pytest.mark.parametrize(
    ("content", "where", "remedy"),
    [
        (b"", "1:1", "brackets"),
        (b"{", "1:2", ""),
        (b'{"a": 1} x', "1:10", ""),
        (b"{'a': 1}", "1:2", "double quotes"),
        (b'{\n  // no\n  "a": 1}', "2:3", "comments"),
        (b'{"a": NaN}', "1:7", "finite"),
        (b'{"a NaN": "NaN",\n "b": -Infinity}', "2:7", "finite"),
        (b'{"a\\"": Infinity}', "1:9", "finite"),
        (b'{"a": "\n"}', "1:8", ""),
    ],
)
def test_not_json(tmp_path: Path, content: bytes, where: str, remedy: str) -> None:
    error = refused_content(tmp_path, content)
    assert (error.code, error.path) == ("config_invalid_json", where)
    assert remedy in error.remedy


@pytest.mark.parametrize("content", [b'{\n "a": 1,\n}', b'{"a":\n[1,]}'])
def test_a_comma_too_many(tmp_path: Path, content: bytes) -> None:
    # Python 3.13 points at the comma, earlier ones behind it.
    error = refused_content(tmp_path, content)
    assert error.code == "config_invalid_json"
    assert error.path[:2] in ("2:", "3:")
    assert "comma" in error.remedy


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 150_000, b'{"a": ' + b"1" * 10_000 + b"}"])
def test_hostile_json(tmp_path: Path, content: bytes) -> None:
    assert refused_content(tmp_path, content).code == "config_invalid_json"


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ('{"llmModels": {}, "llmModels": {}}', "llmModels"),
        ('{"llmModels": {"m": {}, "m": {}}}', "llmModels.m"),
        ('{"llmModels": {"m": {"env": {"A": "1", "A": "1"}}}}', "llmModels.m.env.A"),
        ('{"x": [1, [{"a": 1}, {"b c": 1, "b c": 2}]]}', "x[1][1]['b c']"),
        ('{"mcpServers": {"s": {"k": {"d": 1, "d": 1}}}}', "mcpServers.s.k.d"),
        ('[{"a": 1, "\\u0061": 2}]', "[0].a"),
    ],
)
def test_a_key_that_comes_twice(tmp_path: Path, content: str, path: str) -> None:
    error = refused_content(tmp_path, content.encode())
    assert (error.code, error.path) == ("config_duplicate_key", path)


def test_the_first_repeated_key_is_reported(tmp_path: Path) -> None:
    content = b'{"a": {"x": 1, "x": 1}, "b": {"y": 1, "y": 1}}'
    assert refused_content(tmp_path, content).path == "a.x"


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"1", b"null", b"true"])
def test_the_top_level_is_an_object(tmp_path: Path, content: bytes) -> None:
    assert refused_content(tmp_path, content).code == "config_invalid_type"


def test_the_line_has_code_file_path_problem_and_remedy(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    file.write_text('{"llmModels": {"m": {"comand": "vllm"}}}')
    text = str(refused(file))
    assert text.startswith(f"unknown_key: {file}: llmModels.m.comand: ")
    assert text.endswith("did you mean 'command'?")


def test_nothing_but_the_file_is_opened(
    tmp_path: Path, documented: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models.json"
    file.write_text(json.dumps(documented))
    opened: list[object] = []
    real_open, real_os_open = builtins.open, os.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return real_open(path, *args, **kwargs)

    def os_spy(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(path)
        return real_os_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(os, "open", os_spy)
    load_config(file)
    paths = [path for path in opened if not isinstance(path, int)]
    assert paths == [str(file)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.json"]


def test_identity(tmp_path: Path, short: dict[str, Any]) -> None:
    file = tmp_path / "models.json"
    file.write_text(json.dumps(short))
    (tmp_path / "link.json").symlink_to(file)
    assert load_config(file).identity == load_config(tmp_path / "link.json").identity == os.path.realpath(file)
