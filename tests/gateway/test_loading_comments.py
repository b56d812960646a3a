"""Comments in the stream of a client that waits for its model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from fluidmcp_proxy.gateway import loading
from fluidmcp_proxy.gateway.loading import asks_for_progress, is_streamed, late_refusal, telling, what_it_does
from fluidmcp_proxy.models.state import ModelState, ModelStatus
from tests.gateway.test_loading import launched, url
from tests.serving import DEADLINE, serving

__all__ = ["launched"]

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 3}
WISH = {"prefer": "wait=100, progress"}


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_FIRST_AFTER", 0.1)
    monkeypatch.setattr(loading, "_CHECKED_EVERY", 0.02)


def ask(client: httpx.Client, port: int, body: Any = CHAT, headers: Any = WISH) -> tuple[httpx.Response, list[str]]:
    with client.stream("POST", url(port, "/m/v1/chat/completions"), json=body, headers=headers) as answer:
        return answer, [line for line in answer.iter_lines() if line]


def until_told(loaded: Path, lines: Iterator[str], word: str = "") -> list[str]:
    """The lines that are not empty; the model goes on loading until one of them tells of it with this ``word``."""
    seen: list[str] = []
    for line in filter(None, lines):
        seen.append(line)
        if line.startswith(":") and word in line:
            loaded.touch()
    return seen


def test_a_stream_begins_with_comments_while_the_model_loads(launched: Any, tmp_path: Path) -> None:
    gateway = launched("--load-time", "0.3", "--progress", "30", "--load-until", str(tmp_path / "loaded"))
    with serving(gateway) as port, httpx.Client(timeout=DEADLINE) as client:
        with client.stream("POST", url(port, "/m/v1/chat/completions"), json=CHAT, headers=WISH) as answer:
            lines = until_told(tmp_path / "loaded", answer.iter_lines(), "loading weights")
        comments = [line for line in lines if line.startswith(":")]
        assert (answer.status_code, answer.headers["preference-applied"]) == (200, "progress")
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert len(answer.headers["x-request-id"]) == 32
        assert comments
        assert comments[0].startswith(": m is starting")
        assert any(comment.startswith(": m is starting, loading weights ") for comment in comments)
        assert lines[: len(comments)] == comments
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > len(comments) + 3
        # Nobody has to wait any more.
        answer, lines = ask(client, port)
        assert "preference-applied" not in answer.headers
        assert not [line for line in lines if line.startswith(":")]


@pytest.mark.parametrize(
    ("body", "headers"), [(CHAT, {}), ({**CHAT, "stream": False}, WISH), ({**CHAT, "stream": "true"}, WISH)]
)
def test_nobody_else_gets_comments(launched: Any, body: Any, headers: Any) -> None:
    with serving(launched("--load-time", "0.5")) as port, httpx.Client(timeout=DEADLINE) as client:
        answer, lines = ask(client, port, body, headers)
    assert "preference-applied" not in answer.headers
    assert not [line for line in lines if line.startswith(":")]


def test_a_model_that_does_not_start_is_told_in_the_stream_which_breaks_off(launched: Any) -> None:
    # It begins to start with the request, which is told of it long before the time is over.
    gateway = launched("--never-ready", startup_timeout=2, max_restarts=0, start="on_demand")
    lines: list[str] = []
    with (
        serving(gateway) as port,
        httpx.Client(timeout=DEADLINE) as client,
        client.stream("POST", url(port, "/m/v1/chat/completions"), json=CHAT, headers=WISH) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        lines.extend(answer.iter_lines())
    lines = [line for line in lines if line]
    assert lines[0].startswith(":")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "model_failed"


def test_a_refusal_of_the_server_is_an_event(launched: Any, tmp_path: Path) -> None:
    body = {**CHAT, "stub": {"status": 400}}
    gateway = launched("--load-until", str(tmp_path / "loaded"))
    with (
        serving(gateway) as port,
        httpx.Client(timeout=DEADLINE) as client,
        client.stream("POST", url(port, "/m/v1/chat/completions"), json=body, headers=WISH) as answer,
    ):
        lines = until_told(tmp_path / "loaded", answer.iter_lines())
    assert lines[0].startswith(":")
    assert "error" in json.loads(lines[-2].removeprefix("data: "))
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("value", "asked"),
    [(b"progress", True), (b"wait=5, Progress", True), (b"progress; x", True), (b"in-progress", False), (b"x", False)],
)
def test_who_asks(value: bytes, asked: bool) -> None:
    assert asks_for_progress([(b"accept", b"progress"), (b"prefer", value)]) is asked


@pytest.mark.parametrize("body", [None, b"", b"[true]", b'{"stream": 1}', b'"stream"', b"\xff"])
def test_what_is_no_request_for_a_stream(body: bytes | None) -> None:
    assert not is_streamed(body)


def test_what_is_told_has_no_word_of_the_server() -> None:
    status = ModelStatus(id="m", state=ModelState.STARTING, since=0, progress="secret", stage="compiling", percent=7)
    assert what_it_does(status) == "m is starting, compiling 7 %"
    assert what_it_does(ModelStatus(id="m", state=ModelState.BACKOFF, since=0)) == "m is backoff"


class Refusal:
    def __init__(self, status: int, *chunks: bytes) -> None:
        self.status, self.chunks = status, chunks

    @property
    async def body(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk


@pytest.mark.anyio
async def test_refusals() -> None:
    told: Any = Refusal(400, b'{"error": {"message":', b' "too long"}}')
    assert await late_refusal(told, anthropic=False) == b'data: {"error":{"message":"too long"}}\n\ndata: [DONE]\n\n'
    told = Refusal(400, b'{"type": "error", "error": {"message": "no\\nway"}}')
    event = await late_refusal(told, anthropic=True)
    assert event == b'event: error\ndata: {"type":"error","error":{"message":"no\\nway"}}\n\n'
    for chunks in ([b"<html>"], [b"[1]"], [b"x" * 70_000, b"y"]):
        told = Refusal(404, *chunks)
        assert b"answered with status 404" in await late_refusal(told, anthropic=False)


@pytest.mark.anyio
async def test_nothing_is_told_after_the_wait_and_failures_are_the_callers_own() -> None:
    told: list[bytes] = []

    async def begin() -> None:
        told.append(b"begin")

    async def comment(text: bytes) -> None:
        told.append(text)
        enough.set()

    enough = anyio.Event()
    with anyio.fail_after(DEADLINE):
        with pytest.raises(ZeroDivisionError):
            async with telling(begin, comment, lambda: "loading"):
                raise ZeroDivisionError
        assert told == []
        async with telling(begin, comment, lambda: "loading"):
            await enough.wait()
    assert told == [b"begin", b": loading\n\n"]
