"""Lines and bars about loading models."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from fluidmcp_proxy.cli.progress import bars, changes, endpoints
from fluidmcp_proxy.cli.terminal import Board, bar
from fluidmcp_proxy.models.state import ModelState, ModelStatus
from tests.cli.program import FLUIDMCP
from tests.process.marks import Mark
from tests.serving import DEADLINE

URL = "http://127.0.0.1:8099"


def status(state: ModelState, progress: str | None = None) -> ModelStatus:
    return ModelStatus(id="m", state=state, since=0, progress=progress)


def test_each_change_is_one_line() -> None:
    seen: dict[str, str] = {}
    assert list(changes([status(ModelState.STARTING)], seen, URL)) == ["  m: loading"]
    assert list(changes([status(ModelState.STARTING)], seen, URL)) == []
    assert list(changes([status(ModelState.READY)], seen, URL)) == [f"  m: ready at {URL}/m/v1"]
    assert list(changes([status(ModelState.READY)], seen, URL)) == []
    assert list(changes([status(ModelState.STOPPING)], seen, URL)) == []


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("(EngineCore pid=42) INFO 11-24 09:51:33 [core.py:402] init engine took 5 s", "init engine took 5 s"),
        ("INFO 11-24 09:51:33 [core.py:402] init engine", "init engine"),
        ("INFO:     Application startup complete.", "Application startup complete."),
        (
            "Loading safetensors checkpoint shards:  50% Completed",
            "Loading safetensors checkpoint shards:  50% Completed",
        ),
    ],
)
def test_what_the_server_says_without_its_prefix(said: str, shown: str) -> None:
    (line,) = bars([status(ModelState.STARTING, said)], 0.0)
    assert line.endswith(f" s  {shown}")
    assert list(changes([status(ModelState.STARTING, said)], {}, URL)) == ["  m: loading"]


@pytest.mark.parametrize(
    ("percent", "drawn"),
    [
        (None, "[                    ]      "),
        (0, "[--------------------]   0 %"),
        (25, "[#####---------------]  25 %"),
        (100, "[####################] 100 %"),
    ],
)
def test_a_bar(percent: int | None, drawn: str) -> None:
    assert bar(percent) == drawn


def test_a_bar_for_each_model_that_loads() -> None:
    loading = ModelStatus(id="m", state=ModelState.STARTING, since=2, stage="loading weights", percent=50)
    saying = ModelStatus(id="long", state=ModelState.WAKING, since=1, progress="INFO:     \x1b[31mred")
    drawn = bars([status(ModelState.READY), loading, saying], 44.0)
    assert drawn == [
        "  m    [##########----------]  50 %   42 s  loading weights",
        "  long [                    ]         43 s  \\x1b[31mred",
    ]


def test_the_table_at_the_end() -> None:
    statuses = [status(ModelState.READY), ModelStatus(id="other", state=ModelState.STOPPED, since=0)]
    assert list(endpoints(statuses, URL)) == [
        "MODEL  STATE    URL",
        f"m      ready    {URL}/m/v1",
        f"other  stopped  {URL}/other/v1",
        f"(any)           {URL}/v1",
    ]


def test_a_board_takes_its_own_lines_away_and_no_more() -> None:
    stream = io.StringIO()
    board = Board(stream)
    board.clear()
    assert stream.getvalue() == ""
    board.draw(["one", "two"])
    board.draw(["x" * 500])
    board.clear()
    board.clear()
    assert stream.getvalue() == f"one\ntwo\n\x1b[2A\r\x1b[J{'x' * 79}\n\x1b[1A\r\x1b[J"


def test_a_board_is_no_higher_than_the_terminal() -> None:
    stream = io.StringIO()
    Board(stream).draw([str(number) for number in range(100)])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 22
    assert lines[-1] == "… and 79 more"


def test_on_a_terminal(config: Path, mark: Mark) -> None:
    """Bars while it loads, then they are gone; the log's lines stand above them."""
    program, loaded = config.parent / "bin" / "vllm", config.with_name("loaded")
    first, *rest = program.read_text().splitlines()
    half = "Loading safetensors checkpoint shards:  50%% Completed | 1/2"
    program.write_text(
        "\n".join([first, f"printf '{half}' >&2", f"while [ ! -e {loaded} ]; do sleep 0.02; done", *rest])
    )
    master, slave = pty.openpty()
    env = {**os.environ, "PATH": f"{config.parent / 'bin'}:{os.environ['PATH']}", "FAULT_TEST": mark.value}
    process = subprocess.Popen([*FLUIDMCP, str(config), "--port", "0"], env=env, stdout=slave, stderr=slave)
    os.close(slave)
    said = b""
    try:
        while b"(any)" not in said and (piece := os.read(master, 65536)):
            said += piece
            if b" 50 %" in said:
                loaded.touch()
        process.terminate()
        while piece := reading(master):
            said += piece
        process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    text = said.decode()
    assert re.search(r"  m \[#{10}-{10}\]  50 % +\d+ s  ", text), text
    assert text.count("  m [") == text.count("\x1b[1A\r\x1b[J")
    for line in text.splitlines():
        assert not ("[##" in line and "INFO" in line)
    assert text.rindex("[##") < text.index("ready at http://") < text.index("MODEL  STATE  URL")
    mark.wait_for(0)


def reading(terminal: int) -> bytes:
    """Linux says EIO where a pipe would have ended."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
