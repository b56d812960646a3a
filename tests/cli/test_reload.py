"""``fluidmcp reload`` and SIGHUP."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluidmcp_proxy.cli import main
from tests.cli.conftest import Invoke, Outcome
from tests.cli.program import FLUIDMCP, Program
from tests.process.marks import Mark
from tests.serving import DEADLINE, eventually

Ask = Callable[..., Outcome]


@pytest.fixture
def ask(invoke: Invoke, config: Path) -> Ask:
    """Call ``fluidmcp`` about the gateway of ``config``."""
    return lambda command, *args: invoke(main, command, "--config", config, *args)


def status(ask: Ask) -> dict[str, Any]:
    answer = ask("status", "--json")
    assert answer.exit_code == 0, answer.output
    [model] = json.loads(answer.stdout)["models"]
    assert isinstance(model, dict)
    return model


def change(config: Path, **keys: Any) -> None:
    document = json.loads(config.read_text())
    document["llmModels"]["m"] |= keys
    config.write_text(json.dumps(document))


def test_a_file_that_has_changed(program: Program, config: Path, ask: Ask) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        gateway.until_said("ready at")
        eventually(lambda: ask("status").exit_code == 0, "the control socket")
        pid = status(ask)["pid"]
        assert ask("reload").stdout == "no model has changed\n"
        assert status(ask)["pid"] == pid
        change(config, max_queue=7)
        assert ask("reload").stdout == "changed: m\n"
        eventually(lambda: status(ask)["pid"] not in (pid, None), "another server")
        eventually(lambda: status(ask)["state"] == "ready", "ready")
        change(config, max_queue=8)
        told = json.loads(ask("reload", "--json").stdout)
        assert told == {"added": [], "changed": ["m"], "removed": [], "needs_restart": []}
        gateway.send(signal.SIGTERM)
        assert gateway.ended() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config_invalid_json"),
        (None, "config_not_found"),
        ('{"llmModels": {"m": {"command": "vllm", "max_quue": "kanarie"}}}', "did you mean 'max_queue'"),
    ],
)
def test_a_bad_file_changes_nothing(
    program: Program, config: Path, ask: Ask, tmp_path: Path, content: str | None, said: str
) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        gateway.until_said("ready at")
        good = config.read_text()
        config.unlink()
        if content is not None:
            config.write_text(content)
        answer = reload_in(tmp_path / "run")  # which the file says, and it is spoilt
        assert answer.returncode == 2, answer
        assert said in answer.stderr
        assert len(answer.stderr.splitlines()) == 1
        assert "kanarie" not in answer.stderr
        config.write_text(good)
        assert status(ask)["spawns"] == 1
        assert status(ask)["state"] == "ready"


def reload_in(runtime_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLUIDMCP_RUNTIME_DIR": str(runtime_dir)}
    command = [*FLUIDMCP[:-1], "reload"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_what_needs_a_restart_is_said(program: Program, config: Path, ask: Ask) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        gateway.until_said("ready at")
        document = json.loads(config.read_text())
        document["gateway"]["drain_timeout"] = 7
        config.write_text(json.dumps(document))
        answer = ask("reload")
        assert answer.exit_code == 0
        assert answer.stderr == "unchanged until a restart: drain_timeout\n"


ON_A_TERMINAL = """
import os, signal, sys
outputs = os.dup(1), os.dup(2)
os.login_tty(int(sys.argv[1]))
for number, output in enumerate(outputs, 1):
    os.dup2(output, number)
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[2]))  # the tests may be run by nohup
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def hung_up(
    config: Path, mark: Mark, terminal: int = -1, hup: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A gateway that heeds hang-ups as ``hup`` says on that terminal, or one without any; and what it says."""
    on_terminal = [sys.executable, "-c", ON_A_TERMINAL, str(terminal), hup] if hup else []
    output = config.with_name("output")
    env = {**os.environ, "PATH": f"{config.parent / 'bin'}:{os.environ['PATH']}", "FAULT_TEST": mark.value}
    with output.open("w") as file:
        process = subprocess.Popen(
            [*on_terminal, *FLUIDMCP, str(config), "--port", "0"],
            env=env,
            stdout=file,
            stderr=file,
            pass_fds=[terminal] if hup else [],
            start_new_session=not hup,
        )
    try:
        eventually(lambda: "ready at" in output.read_text() or process.poll() is not None, "ready")
        yield process, output
    finally:
        process.kill()
        process.wait()
    mark.wait_for(0)


def test_hangup_of_a_daemon(config: Path, mark: Mark, ask: Ask) -> None:
    """Without a controlling terminal it reads its file again, and bears a bad one."""
    with hung_up(config, mark) as (process, output):
        good = config.read_text()
        config.write_text("{")
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "the configuration stays as it was" in output.read_text(), "a bad file")
        config.write_text(good)
        change(config, max_queue=7)
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "1 changed" in output.read_text(), "a good file")
        assert process.poll() is None
        assert ask("status").exit_code == 0
        assert "Traceback" not in output.read_text()


@pytest.mark.parametrize("is_ignored", [False, True])
def test_hangup_of_a_terminal(config: Path, mark: Mark, is_ignored: bool) -> None:
    """It ends, as by SIGTERM, unless nohup has it ignore the signal."""
    master, slave = pty.openpty()
    try:
        with hung_up(config, mark, slave, "SIG_IGN" if is_ignored else "SIG_DFL") as (process, output):
            process.send_signal(signal.SIGHUP)
            if is_ignored:
                process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == -(signal.SIGTERM if is_ignored else signal.SIGHUP), output.read_text()
            assert not mark.pids()
    finally:
        os.close(master)
        os.close(slave)
