"""A program: takes the pictures of docs/status-page.md. ``python -m tests.page.screenshots FOLDER``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from tests.page.conftest import ADMIN_KEY, FLAGS
from tests.serving import STUB, free_port, serving

MODELS = {
    "qwen3-8b": ["--token-interval", "0.03", "--answer-delay", "0.2"],
    "embeddings": ["--token-interval", "0.01"],
    "llama-70b": ["--load-time", "600", "--progress", "90"],
    "mixtral": ["--crash", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.00 GiB."],
}
PICTURES: dict[str, dict[str, Any]] = {
    "status-page": {"viewport": {"width": 1200, "height": 1240}},
    "status-page-dark": {"viewport": {"width": 1200, "height": 1240}, "color_scheme": "dark"},
    "status-page-phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "color_scheme": "dark"},
}


def gateway(folder: str) -> Gateway:
    entries = {}
    for name, arguments in MODELS.items():
        port = free_port()
        args = ["-S", "-E", str(STUB), "serve", name, "--port", str(port), *arguments]
        base_url = {"base_url": f"http://localhost:{port}/v1"}
        entries[name] = {"command": sys.executable, "args": args, "endpoints": base_url, "max_restarts": 0}
    settings = {"log_dir": f"{folder}/log", "runtime_dir": f"{folder}/run", "admin_keys": [ADMIN_KEY]}
    return Gateway(parse_config({"llmModels": entries, "gateway": settings}, environ={"PATH": "/usr/bin:/bin"}))


def use(port: int, model: str, over: threading.Event) -> None:
    """A client that asks, reads and pauses."""
    words = 20
    while not over.is_set():
        words = 20 + words * 7 % 60
        question = {"role": "user", "content": "the quick brown fox " * words}
        body = json.dumps({"model": model, "messages": [question], "stream": True, "max_tokens": words}).encode()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, body)) as answer:
            answer.read()
        over.wait(words / 60)


def prepare(page: Page, port: int) -> None:
    page.goto(f"http://127.0.0.1:{port}/")
    page.get_by_role("button", name="Use a key").click()
    page.get_by_label("A key of this gateway").fill(ADMIN_KEY)
    page.get_by_role("button", name="Open").click()
    page.get_by_label("Message").fill("Streams arrive word by word.")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def main(folder: str) -> None:
    over = threading.Event()
    with tempfile.TemporaryDirectory() as state, serving(gateway(state)) as port, sync_playwright() as playwright:
        flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        pages = {name: browser.new_page(**options) for name, options in PICTURES.items()}
        for model in ["qwen3-8b"] * 6 + ["embeddings"] * 2:
            threading.Thread(target=use, args=(port, model, over), daemon=True).start()
        for page in pages.values():
            prepare(page, port)
        pages["status-page"].wait_for_timeout(75_000)  # until the charts are full of something
        for name, page in pages.items():
            page.bring_to_front()
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(1500)
            page.screenshot(path=Path(folder, f"{name}.png"))
        over.set()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
