"""``fluidmcp migrate``: prints, or replaces a file in one step and keeps the old one."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluidmcp_proxy.cli.migrate import migrate
from fluidmcp_proxy.config import load_config

OLD = {
    "mcpServers": {
        "vllm": {"command": "python", "args": ["vllm_server.py"],
                 "env": {"VLLM_MODEL_NAME": "m", "HF_TOKEN": "hunter2-hunter2"}},
        "other": {"command": "npx"},
    }
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "conf.json"
    file.write_text(json.dumps(OLD))
    file.chmod(0o640)
    return file


@pytest.fixture
def run(invoke: Callable[..., Any]) -> Callable[..., Any]:
    """Migrate with these arguments."""
    return lambda *args: invoke(migrate, *args)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_prints_the_new_file(run: Callable[..., Any], file: Path) -> None:
    result = run(file)
    assert result.exit_code == 0
    new = json.loads(result.stdout)
    assert list(new) == ["llmModels", "mcpServers"]
    assert new["mcpServers"] == {"other": {"command": "npx"}}
    assert result.stderr == "mcpServers.vllm -> llmModels.vllm\n"
    assert json.loads(file.read_text()) == OLD
    assert names(file.parent) == ["conf.json"]


def test_it_replaces_the_file_and_keeps_the_old_one(run: Callable[..., Any], file: Path) -> None:
    result = run("--write", file)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "hunter2-hunter2" not in result.stderr
    assert list(load_config(file).models) == ["vllm"]
    assert json.loads((file.parent / "conf.json.bak").read_text()) == OLD
    assert names(file.parent) == ["conf.json", "conf.json.bak"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()} == {0o640}


def test_an_older_backup_is_kept_too(run: Callable[..., Any], file: Path) -> None:
    (file.parent / "conf.json.bak").write_text("older")
    run("--write", file)
    assert (file.parent / "conf.json.bak").read_text() == "older"
    assert json.loads((file.parent / "conf.json.bak.1").read_text()) == OLD


def test_a_second_run_changes_nothing(run: Callable[..., Any], file: Path) -> None:
    run("--write", file)
    before = file.read_bytes()
    result = run("--write", file)
    assert result.exit_code == 0
    assert "nothing to migrate" in result.stderr
    assert file.read_bytes() == before
    assert names(file.parent) == ["conf.json", "conf.json.bak"]


def test_a_link_stays_a_link(run: Callable[..., Any], file: Path) -> None:
    link = file.parent / "link.json"
    link.symlink_to(file)
    run("--write", link)
    assert link.is_symlink()
    assert "llmModels" in json.loads(file.read_text())


def test_another_file(run: Callable[..., Any], file: Path) -> None:
    target = file.parent / "new.json"
    result = run(file, "-o", target)
    assert result.exit_code == 0
    assert "llmModels" in json.loads(target.read_text())
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "it may hold secrets"
    assert json.loads(file.read_text()) == OLD


def test_an_interrupted_write_leaves_the_old_file(
    run: Callable[..., Any], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    result = run("--write", file)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert json.loads(file.read_text()) == OLD
    assert not [name for name in names(file.parent) if name.startswith(".")]


def test_a_file_that_cannot_be_read(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run(tmp_path / "missing.json")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"config_not_found: {tmp_path}/missing.json: ")
    (tmp_path / "bad.json").write_text("{")
    assert run(tmp_path / "bad.json").stderr.startswith("config_invalid_json: ")


def test_both_targets_are_bad_usage(run: Callable[..., Any], file: Path) -> None:
    assert run(file, "--write", "-o", "x").exit_code == 2


def test_a_terminal_that_knows_only_ascii(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "conf.json"
    file.write_text(json.dumps({"mcpServers": {"ö": OLD["mcpServers"]["vllm"], "ü": {}}}))
    assert '"ü"' in run(file).stdout
    # The module by its name: the package's attribute of that name is the command.
    terminal = SimpleNamespace(stdout=SimpleNamespace(encoding="ascii"))
    monkeypatch.setattr(sys.modules["fluidmcp_proxy.cli.migrate"], "sys", terminal)
    result = run(file)
    assert result.stdout.isascii()
    assert list(json.loads(result.stdout)["mcpServers"]) == ["ü"]
