"""The command line against a running gateway: through its socket, and by URL."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.cli import main
from fluidmcp_proxy.cli.operate import _row, _span
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.process.control_socket import control_sockets, reserved
from tests.cli.conftest import Invoke, Outcome
from tests.cli.program import FLUIDMCP, Program, Running, started
from tests.serving import DEADLINE, eventually, free_port, serving

OPS = "kanarie-ops-0123456789abcdef"

Ask = Callable[..., Outcome]


@pytest.fixture
def ask(invoke: Invoke, tmp_path: Path) -> Ask:
    """Call ``fluidmcp`` with the runtime folder of this test."""

    def call(*args: object, **environ: str | None) -> Outcome:
        outcome = invoke(main, *args, FLUIDMCP_RUNTIME_DIR=str(tmp_path / "run"), **environ)
        assert "Traceback" not in outcome.output
        return outcome

    return call


def statuses(ask: Ask) -> dict[str, Any]:
    answer = ask("status", "--json")
    assert answer.exit_code == 0, answer.output
    return {model["id"]: model for model in json.loads(answer.stdout)["models"]}


def ready(gateway: Running) -> str:
    return gateway.until_said("ready at").split()[-1]


def test_a_day_of_a_model(program: Program, config: Path, ask: Ask, tmp_path: Path) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        ready(gateway)
        [path] = eventually(lambda: control_sockets(tmp_path / "run"), "the control socket")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(Path(path).parent).st_mode) == 0o700
        table = ask("status").stdout.splitlines()
        assert table[0].split()[:2] == ["MODEL", "STATE"]
        assert table[1].split()[:2] == ["m", "ready"]
        assert ask("restart", "m").stdout == "m: restart asked for\n"
        eventually(lambda: statuses(ask)["m"]["spawns"] == 2, "another start")
        eventually(lambda: statuses(ask)["m"]["state"] == "ready", "ready")
        assert json.loads(ask("stop", "m", "--json").stdout)["id"] == "m"
        eventually(lambda: statuses(ask)["m"]["state"] == "stopped", "stopped")
        assert ask("start", "m").exit_code == 0
        eventually(lambda: statuses(ask)["m"]["state"] == "ready", "ready")
        assert "asked for by owner" in gateway.said
        gateway.send(signal.SIGTERM)
        gateway.ended()
        assert control_sockets(tmp_path / "run") == []
        assert not Path(path).exists()


def test_logs(program: Program, config: Path, ask: Ask, tmp_path: Path) -> None:
    document = json.loads(config.read_text())
    document["llmModels"]["m"]["args"] += ["--print-env", "GREETING"]
    document["llmModels"]["m"]["env"] = {"GREETING": "hello-there"}
    config.write_text(json.dumps(document))
    command = [sys.executable, "-m", "fluidmcp_proxy", "logs", "m", "--follow", "--config", str(config)]
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        ready(gateway)
        eventually(lambda: "hello-there" in ask("logs", "m").stdout, "a line of the server")
        assert ask("logs", "m", "-n", "0").stdout == ""
        with started(*command, folder=tmp_path) as reader:
            eventually(lambda: reader.said.count("hello-there") == 1, "what there was")
            assert ask("restart", "m").exit_code == 0
            eventually(lambda: reader.said.count("hello-there") == 2, "what came")
            reader.send(signal.SIGINT)
            assert reader.ended() == 130
            assert "Traceback" not in reader.said
        with started(*command, folder=tmp_path) as reader:
            eventually(lambda: reader.said.count("hello-there") == 2, "what there was")
            gateway.send(signal.SIGTERM)
            assert reader.ended() == 0
        gateway.ended()


def test_unknown_models(program: Program, config: Path, ask: Ask) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        ready(gateway)
        for command in ("start", "stop", "restart", "logs"):
            for name in ("nobody", "no/body", "../m", "?", "ü"):
                answer = ask(command, name)
                assert answer.exit_code == 1
                assert answer.stdout == ""
                assert len(answer.stderr.splitlines()) == 1


def test_several_gateways(program: Program, config: Path, ask: Ask) -> None:
    other = config.with_name("others.json")
    document = json.loads(config.read_text())
    document["llmModels"] = {"far": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}}
    other.write_text(json.dumps(document))
    command = [*FLUIDMCP, str(other), "--port", "0"]
    with program(*FLUIDMCP, str(config), "--port", "0") as one, started(*command, folder=other.parent) as two:
        eventually(lambda: len(control_sockets(config.parent / "run")) == 2, "two control sockets")
        answer = ask("status")
        assert answer.exit_code == 2
        for gateway, file in ((one, config), (two, other)):
            assert f"{file} at http://127.0.0.1:" in answer.stderr
            assert f"pid {gateway.pid}" in answer.stderr
        assert "far" in ask("status", "--config", other).stdout
        assert "far" not in ask("status", "--config", config).stdout
        refused = ask("stop", "far", "--config", other)
        assert (refused.exit_code, "not run by this gateway" in refused.stderr) == (1, True)


def test_no_gateway(ask: Ask, config: Path) -> None:
    for command in (["status"], ["logs", "m"], ["start", "m"], ["stop", "m"], ["restart", "m"]):
        for options in ([], ["--config", config], ["--url", f"http://127.0.0.1:{free_port()}"]):
            answer = ask(*command, *options)
            assert answer.exit_code == 3
            assert len(answer.stderr.splitlines()) == 1
    assert ask("status", "--config", "/nowhere.json").exit_code == 3


def test_a_socket_of_a_gateway_that_was_killed(program: Program, config: Path, ask: Ask, tmp_path: Path) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        [path] = eventually(lambda: control_sockets(tmp_path / "run"), "the control socket")
        gateway.send(signal.SIGKILL)
        gateway.ended()
        assert ask("status").exit_code == 3
        assert Path(path).exists()
        with program(*FLUIDMCP, str(config), "--port", "0") as second:
            ready(second)
            assert statuses(ask)["m"]["state"] == "ready"
            assert not Path(path).exists()


def test_without_a_control_socket_the_gateway_runs(program: Program, config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "control").write_text("in the way")
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        ready(gateway)
        gateway.until_said("no control socket")


def test_reserving_removes_what_is_left_and_nothing_else(tmp_path: Path) -> None:
    with reserved(tmp_path, "one") as path, reserved(tmp_path, "two") as other:
        assert path != other
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert control_sockets(tmp_path) == []  # nobody listens yet
        left = path.rpartition("-")[0] + "-1"
        os.rename(path, left)
        with reserved(tmp_path, "one"):
            assert not Path(left).exists()
        assert Path(other).exists()
    assert not Path(other).exists()


def test_a_long_runtime_folder(tmp_path: Path) -> None:
    with reserved(tmp_path / ("x" * 100), "one") as path:
        assert len(path) < 104


# By URL


def at(folder: Path, **settings: Any) -> Gateway:
    models = {"far": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}}
    return Gateway(parse_config({"llmModels": models, "gateway": settings}, environ={}))


def test_a_url_and_a_key(ask: Ask, tmp_path: Path) -> None:
    with serving(at(tmp_path, api_keys=["0123456789abcdef"], admin_keys=[OPS])) as port:
        url = f"http://127.0.0.1:{port}"
        for key in (None, "kanarie-wrong-0123456789abcdef"):
            answer = ask("status", "--url", url, FLUIDMCP_CLIENT_KEY=key)
            assert answer.exit_code == 1
            assert "FLUIDMCP_CLIENT_KEY" in answer.stderr
            assert "kanarie" not in answer.output
        assert "far" in ask("status", "--url", f"{url}/v1/", FLUIDMCP_CLIENT_KEY=OPS).stdout
        answer = ask("stop", "far", "--url", url, FLUIDMCP_CLIENT_KEY=OPS)
        assert (answer.exit_code, "not run by this gateway" in answer.stderr) == (1, True)


def test_a_key_that_is_none(ask: Ask, tmp_path: Path) -> None:
    with serving(at(tmp_path)) as port:
        answer = ask("status", "--url", f"http://127.0.0.1:{port}", FLUIDMCP_CLIENT_KEY="kanarie\r\nx: y")
        assert answer.exit_code == 3
        assert "kanarie" not in answer.output


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://x", "http://user:kanarie@x", "http://x:99999"])
def test_a_url_that_is_none(ask: Ask, url: str) -> None:
    answer = ask("status", "--url", url)
    assert answer.exit_code == 2
    assert "kanarie" not in answer.output


@pytest.mark.parametrize("body", [b"hello", b"{}", b"[]", b'{"error": 1}', b"\xff", b'{"models": 1}'])
@pytest.mark.parametrize("status", [200, 404])
def test_somebody_who_is_no_gateway(ask: Ask, status: int, body: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with serving(app) as port:
        answer = ask("status", "--url", f"http://127.0.0.1:{port}")
        assert answer.exit_code == 3
        assert len(answer.stderr.splitlines()) == 1


def test_both_ways_at_once(ask: Ask) -> None:
    assert ask("status", "--url", "http://x", "--config", "y").exit_code == 2


# What is shown


def test_a_row_is_safe_to_show() -> None:
    model = {
        "id": "m", "state": "failed", "since": 0.0, "pid": None, "restarts": 3, "in_flight": 0, "queued": 1,
        "message": "it \x1b[31mdied\nlast words", "stage": None, "progress": None, "percent": None,
    }  # fmt: skip
    assert _row(model, 200.0) == ["m", "failed", "3 min", "-", "3", "0", "1", "it \\x1b[31mdied"]
    model |= {"state": "starting", "stage": "loading weights", "percent": 25}
    assert _row(model, 5.0)[-1] == "loading weights, 25 %"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200000, "2 d")]
)
def test_spans(seconds: float, text: str) -> None:
    assert _span(seconds) == text


def test_every_command_explains_itself(ask: Ask) -> None:
    for name, command in main.commands.items():
        assert isinstance(command, click.Command)
        answer = ask(name, "--help")
        assert answer.exit_code == 0
        assert answer.stdout.startswith("Usage: ")
        assert all(
            param.get_help_record(click.Context(command))
            for param in command.params
            if param.param_type_name == "option"
        )


def test_one_command_as_a_process(config: Path) -> None:
    command = [sys.executable, "-m", "fluidmcp_proxy", "status", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout) == (3, "")
