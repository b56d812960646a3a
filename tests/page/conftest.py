"""Chromium, and a gateway for it to look at."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, sync_playwright

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from tests.serving import DEADLINE, STUB, free_port

FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-precise-memory-info",
)  # fmt: skip
ADMIN_KEY = "admin-0123456789abcdef"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a screen."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=[*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        )
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A profile of its own for each test, which may talk to this machine only."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(DEADLINE * 1000)
    yield context
    context.close()


@pytest.fixture
def complaints() -> list[str]:
    """Every error of the console or of a script. A test removes what it has provoked on purpose."""
    return []


@pytest.fixture
def page(context: BrowserContext, complaints: list[str]) -> Iterator[Page]:
    """A tab that may not complain."""

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def fault(error: Error) -> None:
        complaints.append(str(error))

    page = context.new_page()
    page.on("console", note)
    page.on("pageerror", fault)
    yield page
    assert complaints == []


@pytest.fixture
def launching(short_path: Path) -> Any:
    """A gateway that launches stub servers with these arguments each; ``keys`` are those of each model."""

    def make(models: dict[str, list[str]], gateway: dict[str, Any] | None = None, **keys: Any) -> Gateway:
        entries = {}
        for name, arguments in models.items():
            port = free_port()
            args = ["-S", "-E", str(STUB), "serve", f"org/{name}", "--port", str(port), *arguments]
            base_url = {"base_url": f"http://localhost:{port}/v1"}
            entries[name] = {"command": sys.executable, "args": args, "endpoints": base_url, "stop_timeout": 5, **keys}
        folders = {"log_dir": str(short_path / "log"), "runtime_dir": str(short_path / "run")}
        document = {"llmModels": entries, "gateway": {**folders, **(gateway or {})}}
        return Gateway(parse_config(json.loads(json.dumps(document)), environ={"PATH": "/usr/bin:/bin"}))

    return make
