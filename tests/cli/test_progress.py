"""Lines about loading models."""

from __future__ import annotations

import pytest

from fluidmcp_proxy.cli.progress import changes
from fluidmcp_proxy.models.state import ModelState, ModelStatus

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
        ("x" * 500, "x" * (110 - len("  m: loading: "))),
    ],
)
def test_what_the_server_says_without_its_prefix(said: str, shown: str) -> None:
    assert list(changes([status(ModelState.STARTING, said)], {}, URL)) == [f"  m: loading: {shown}"]
