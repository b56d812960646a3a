"""The status page in a real Chromium: what a person sees, hears and can do, and that it can stay open for days."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.page.conftest import ADMIN_KEY
from tests.serving import DEADLINE, serving

pytestmark = pytest.mark.page
expect.set_options(timeout=DEADLINE * 1000)

ADMIN = {"admin_keys": [ADMIN_KEY]}


@contextmanager
def looking_at(app: Any, page: Page, path: str = "/") -> Iterator[str]:
    """The page of a gateway, closed before the server ends, which would wait for the feed."""
    with serving(app) as port:
        url = f"http://127.0.0.1:{port}{path}"
        page.goto(url)
        yield url
        page.goto("about:blank")


def card(page: Page, model: str) -> Any:
    return page.get_by_role("article", name=model, exact=True)


def unlock(page: Page, key: str) -> None:
    page.get_by_label("A key of this gateway").fill(key)
    page.get_by_role("button", name="Open").click()


def states_of(page: Page, model: str) -> None:
    """Have the page write down each state that it shows of ``model`` from now on, and what it announces."""
    page.evaluate(
        """model => {
            const state = document.getElementById(`model-${model}`).closest("article").querySelector(".state");
            const news = document.getElementById("news");
            window.seen = [state.textContent];
            window.told = [];
            new MutationObserver(() => seen.push(state.textContent)).observe(state, {childList: true, subtree: true});
            new MutationObserver(() => told.push(news.textContent)).observe(news, {childList: true, subtree: true});
        }""",
        model,
    )


def in_order(wanted: list[str], seen: list[str]) -> bool:
    rest = iter(seen)
    return all(state in rest for state in wanted)


def test_a_model_loads_crashes_and_comes_back(page: Page, launching: Any, short_path: Path) -> None:
    loaded = short_path / "loaded"
    gateway = launching({"m": ["--load-time", "0.1", "--progress", "10", "--load-until", str(loaded)]})
    with looking_at(gateway, page):
        state = card(page, "m").locator(".state")
        expect(state).to_have_text("starting")
        states_of(page, "m")
        expect(card(page, "m").get_by_role("progressbar")).to_be_visible()
        loaded.touch()
        expect(state).to_have_text("ready")
        loaded.unlink()
        expect(page.get_by_text("live", exact=True)).to_be_visible()
        pid = gateway.status("m").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        expect(card(page, "m").locator(".last_exit")).to_contain_text("SIGKILL")
        expect(card(page, "m").locator(".restarts")).to_have_text("1")
        expect(state).to_have_text("starting")
        loaded.touch()
        expect(state).to_have_text("ready")
        expect(page.locator("#news")).to_have_text("m is ready")
        seen, told = page.evaluate("[seen, told]")
        assert in_order(["starting", "ready", "starting", "ready"], seen)
        assert told[-1] == "m is ready"


def test_a_streamed_chat(page: Page, launching: Any, short_path: Path) -> None:
    """Of which the page shows a part before the rest is made."""
    rest = short_path / "rest"
    gateway = launching({"m": ["--hang-after", "10", "--hang-until", str(rest)], "other": []})
    with looking_at(gateway, page):
        expect(card(page, "m").locator(".state")).to_have_text("ready")
        page.get_by_label("Model", exact=True).select_option("m")
        words = " ".join(f"word{number}" for number in range(40))
        page.get_by_label("Message").fill(words)
        page.keyboard.press("Enter")
        answer = page.locator("#talk p.assistant")
        expect(answer).to_contain_text("word")
        assert page.get_by_role("button", name="Stop", exact=True).is_enabled()
        rest.touch()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        assert "word39" in answer.inner_text()
        expect(page.locator("#chat-note")).to_have_text("")
        chart = card(page, "m").get_by_role("img", name="tokens/s")
        expect(chart).to_have_attribute("aria-label", re.compile(r"at most (?!0\b)"))
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#talk p")).to_have_count(0)


def test_an_answer_can_be_stopped_and_may_break_off(page: Page, complaints: list[str], launching: Any) -> None:
    gateway = launching({"m": ["--token-interval", "0.05"]}, max_restarts=0)
    with looking_at(gateway, page):
        expect(card(page, "m").locator(".state")).to_have_text("ready")
        for end in ("stop", "die"):
            page.get_by_label("Message").fill("a b c " * 200)
            page.get_by_role("button", name="Send").click()
            expect(page.locator("#talk p.assistant").last).to_contain_text("a b")
            if end == "stop":
                page.get_by_role("button", name="Stop", exact=True).click()
                expect(page.locator("#chat-note")).to_have_text("stopped")
            else:
                pid = gateway.status("m").pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                expect(page.locator("#chat-note.wrong")).not_to_have_text("")
        expect(card(page, "m").locator(".state")).to_have_text("failed")
        expect(card(page, "m").locator(".message")).to_contain_text("was killed by SIGKILL")
        complaints.clear()  # Chromium reports the answer that broke off


def test_who_has_no_key_is_asked_for_it(page: Page, complaints: list[str], launching: Any) -> None:
    with looking_at(launching({"m": []}, {"api_keys": ["user-0123456789abcdef"], **ADMIN}), page) as url:
        expect(page.get_by_text("locked")).to_be_visible()
        expect(page.get_by_label("A key of this gateway")).to_be_focused()
        assert "m" not in page.locator("#models").inner_text()
        unlock(page, "wrong-0123456789abcdef")
        expect(page.get_by_text("That key does not open this gateway.")).to_be_visible()
        unlock(page, "user-0123456789abcdef")
        expect(card(page, "m").locator(".state")).to_have_text("ready")
        assert page.get_by_role("button", name="Restart m").count() == 0
        assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", url]
        page.get_by_role("button", name="Forget the key").click()
        expect(page.get_by_text("locked")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        assert all("401" in complaint for complaint in complaints)
        complaints.clear()


def test_an_administrator_works_by_keyboard(page: Page, launching: Any) -> None:
    with looking_at(launching({"m": []}, ADMIN), page):
        state = card(page, "m").locator(".state")
        expect(state).to_have_text("ready")
        assert page.get_by_role("button", name="Stop m").count() == 0
        page.get_by_role("button", name="Use a key").press("Enter")
        expect(page.get_by_label("A key of this gateway")).to_be_focused()
        page.keyboard.type(ADMIN_KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Start m", exact=True)).to_be_disabled()
        page.get_by_role("button", name="Stop m").press("Enter")
        expect(state).to_have_text("stopped")
        expect(page.get_by_role("button", name="Stop m")).to_be_disabled()
        page.get_by_role("button", name="Start m", exact=True).press("Enter")
        expect(state).to_have_text("ready")
        card(page, "m").get_by_text("Log", exact=True).press("Enter")
        expect(page.get_by_label("Log of m")).to_contain_text("INFO")


def test_the_gateway_ends(page: Page, complaints: list[str], launching: Any) -> None:
    gateway = launching({"m": []})
    with serving(gateway) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        expect(card(page, "m").locator(".state")).to_have_text("ready")
    expect(page.locator("#connection.lost")).to_be_visible()
    complaints.clear()  # connections that are refused


def test_below_a_mount_point(page: Page, launching: Any) -> None:
    gateway = launching({"m": []})
    with looking_at(Starlette(routes=[Mount("/a/llm", app=gateway)], lifespan=gateway.lifespan), page, "/a/llm"):
        expect(card(page, "m").locator(".state")).to_have_text("ready")
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#talk p.assistant")).to_contain_text("hello")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_accessibility(browser: Browser, launching: Any, scheme: Any, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    context.set_default_timeout(DEADLINE * 1000)
    page = context.new_page()
    gateway = launching(
        {"good": [], "bad": ["--crash", "CUDA out of memory"], "slow": ["--never-ready"]}, ADMIN, max_restarts=0
    )
    with looking_at(gateway, page):
        page.get_by_role("button", name="Use a key").click()
        look(page)
        unlock(page, ADMIN_KEY)
        expect(card(page, "bad").locator(".state")).to_have_text("failed")
        expect(card(page, "good").locator(".state")).to_have_text("ready")
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#talk p.assistant")).to_contain_text("hello")
        for log in page.get_by_text("Log", exact=True).all():
            log.click()
        expect(page.get_by_label("Log of bad")).to_contain_text("CUDA out of memory")
        look(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it has to be scrolled sideways"
    context.close()


def look(page: Page) -> None:
    """axe-core has nothing to complain about, of whatever impact."""
    violations = Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in violations] == []


DAYS = """
(() => {
  const fetched = window.fetch;
  const states = ["starting", "ready", "backoff", "starting", "ready", "stopping", "stopped", "failed"];
  let second = 0;
  window.until = 0;
  const model = (id) => ({
    id, state: states[Math.floor(second / 7) % 8], since: 1e9 + second - (second % 7), restarts: second % 4,
    last_exit: `exited with code ${second}`, message: `failed ${second}\\n`.repeat(20), stage: "loading weights",
    percent: second % 100, in_flight: second % 9, queued: 0, per_second: second % 17 ? second % 100 : null,
    unit: "tokens", ttfb: second % 5 ? null : second / 1e5,
  });
  const event = () => `data: ${JSON.stringify({
    time: 1e9 + second, closing: false, admin: false,
    models: ["always", `m${Math.floor(second / 600) % 3}`, `once-${Math.floor(second / 3600)}`].map(model),
  })}\\n\\n`;
  const body = () => new ReadableStream({
    async pull(feed) {
      while (second >= window.until) await new Promise((resolve) => setTimeout(resolve, 5));
      for (let left = 200; left && second < window.until; left--, second++)
        feed.enqueue(new TextEncoder().encode(event()));
      window.second = second;
      await new Promise(requestAnimationFrame);
      if (second % 600 === 0) feed.close();
    },
  });
  window.fetch = (path, options) =>
    path === "models" ? Promise.resolve(new Response(body())) : fetched(path, options);
})();
"""


@pytest.mark.timeout(900)
def test_days_do_not_make_it_grow(page: Page, launching: Any) -> None:
    """A day of events, as fast as frames are drawn, with models that come and go."""
    page.add_init_script(DAYS)
    chromium = page.context.new_cdp_session(page)
    chromium.send("Performance.enable")

    def size_at(second: int) -> tuple[float, float]:
        page.evaluate("until => { window.until = until; }", second)
        page.wait_for_function("until => window.second >= until", arg=second, timeout=300_000)
        for _ in range(3):
            page.evaluate("new Promise(requestAnimationFrame)")
            chromium.send("HeapProfiler.collectGarbage")
        metrics = {one["name"]: one["value"] for one in chromium.send("Performance.getMetrics")["metrics"]}
        return metrics["JSHeapUsedSize"], metrics["Nodes"]

    with looking_at(launching({"m": []}), page):
        early_heap, early_nodes = size_at(3600)
        late_heap, late_nodes = size_at(25 * 3600)
        print(f"heap {early_heap:.0f} -> {late_heap:.0f} bytes, {early_nodes:.0f} -> {late_nodes:.0f} nodes")
        assert card(page, "always").count() == 1
        assert page.locator("article").count() == 3
        path = card(page, "always").locator("path").last.get_attribute("d")
        assert path is not None
        assert len(path.replace("M", "L").split("L")) - 1 <= 120
    assert late_heap < early_heap * 1.2 + 200_000
    assert late_nodes < early_nodes * 1.2 + 50
