"""The log of the command line: order, lines for people, one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Literal

import pytest

from fluidmcp_proxy.cli.logs import Terminal
from fluidmcp_proxy.gateway.record import RequestRecord, access_log
from fluidmcp_proxy.gateway.relay import AnswerTruncated

RECORD = RequestRecord("r-1", "POST", "/v1/chat/completions", "m", 200, 10, 2, 1.5, 0.25, 0.0, "complete", "-", "-")
Form = Literal["text", "json"]


def line_of(message: object, *, name: str = access_log.name, failure: BaseException | None = None) -> logging.LogRecord:
    about = None if failure is None else (type(failure), failure, failure.__traceback__)
    record = logging.LogRecord(name, logging.INFO, "", 0, message, (), about)
    record.created, record.msecs = 1_700_000_000.25, 250
    return record


def written(form: Form, *records: logging.LogRecord) -> str:
    terminal = Terminal(form)
    terminal.setStream(stream := io.StringIO())
    for record in records:
        terminal.handle(record)
    terminal.flush()
    return stream.getvalue()


def reported(form: Form, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.25)
    terminal = Terminal(form)
    terminal.setStream(stream := io.StringIO())
    terminal.report(RECORD)
    terminal.flush()
    return stream.getvalue()


@pytest.fixture
def at_info() -> Iterator[None]:
    level = access_log.level
    access_log.setLevel(logging.INFO)
    yield
    access_log.setLevel(level)


@pytest.mark.usefixtures("at_info")
def test_an_access_line_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reported("text", monkeypatch).endswith(f",250 INFO    {RECORD}\n")
    assert reported("text", monkeypatch) == written("text", line_of(RECORD))  # as if it had been logged


@pytest.mark.usefixtures("at_info")
def test_an_access_line_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"time": "2023-11-14T22:13:20.250Z", "level": "info", "logger": "fluidmcp_proxy.access"}
    assert json.loads(reported("json", monkeypatch)) == {**told, **RECORD._asdict()}


@pytest.mark.usefixtures("at_info")
def test_no_access_line_above_info(monkeypatch: pytest.MonkeyPatch) -> None:
    access_log.setLevel(logging.WARNING)
    assert reported("text", monkeypatch) == ""


def test_any_other_line_for_programs_is_one_line() -> None:
    text = written("json", line_of("model m: failed\nCUDA “out of memory”", name="fluidmcp_proxy.models"))
    assert text.count("\n") == 1
    assert json.loads(text)["message"] == "model m: failed\nCUDA “out of memory”"


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception(form: Form) -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = line_of("it failed", name="uvicorn.error", failure=sys.exc_info()[1])
    text = written(form, record)
    assert "ValueError: why" in (json.loads(text)["exception"] if form == "json" else text)
    assert form == "text" or text.count("\n") == 1


def test_an_abort_is_no_fault() -> None:
    assert written("text", line_of("Exception in ASGI application", failure=AnswerTruncated("cut"))) == ""


@pytest.mark.usefixtures("at_info")
def test_lines_of_requests_are_held_back_until_another_one_comes() -> None:
    terminal = Terminal()
    terminal.setStream(stream := io.StringIO())
    terminal.report(RECORD)
    assert stream.getvalue() == ""
    terminal.handle(line_of("model m: ready", name="fluidmcp_proxy.models"))
    first, second = stream.getvalue().splitlines()
    assert first.endswith(str(RECORD))
    assert second.endswith("model m: ready")
