"""The documentation says what the code does: its links, its blocks, its lists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from fluidmcp_proxy import errors
from fluidmcp_proxy.cli import main
from fluidmcp_proxy.config.load import parse_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LATER = {"AmbiguousModel", "HostNotAllowed", "InvalidApiKey", "InvalidJSON", "ModelRequired", "OriginNotAllowed"}
LATER |= {"QueueFull", "RequestTimeout"}
"""Exceptions that nothing raises yet."""


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text()))
        if kind == language
    ]


@pytest.mark.parametrize("text", blocks("json"))
def test_json_blocks_are_configurations(text: str) -> None:
    document = json.loads(text)
    if "llmModels" in document:
        parse_config(document, environ={"HF_TOKEN": "hf_example", "OPENAI_API_KEY": "sk-example"})


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_compile(text: str) -> None:
    compile(text, "block", "exec", dont_inherit=True)


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for kind, text in BLOCK.findall(page.read_text())
    if kind == "bash"
    for line in text.splitlines()
    if line.startswith("fluidmcp ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_their_options(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    command = main.commands[words[0]]
    with click.Context(main) as context:
        command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_error_is_documented() -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    documented = set(re.findall(r"^\| (\d{3}) \| `(\w+)`", text, re.MULTILINE))
    classes = [getattr(errors, name) for name in errors.__all__]
    raised = [
        kind
        for kind in classes
        if isinstance(kind, type) and issubclass(kind, errors.GatewayError) and kind.__name__ not in LATER
    ]
    assert {(str(kind.status), kind.code) for kind in raised if kind.code != "internal_error"} == documented


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert set(re.findall(r"^\| `fluidmcp (\w+)", text, re.MULTILINE)) == set(main.commands)
