"""Requests to a model that is launched: waiting for it, being told why it is not there, being cut when it ends."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from tests.serving import DEADLINE, STUB, eventually, free_port, serving


@pytest.fixture
def launched(tmp_path: Path) -> Any:
    """A gateway that launches the stub server as ``m`` with these arguments; ``keys`` are the model's."""

    def make(*arguments: str, drain_timeout: float = 30, **keys: Any) -> Gateway:
        port = free_port()
        args = ["-S", "-E", str(STUB), "serve", "m", "--port", str(port), *arguments]
        entry = {"command": sys.executable, "args": args, "restart_delay": 0.01, "stop_timeout": 5, **keys}
        entry["endpoints"] = {"base_url": f"http://localhost:{port}/v1"}
        folders = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run")}
        gateway = {**folders, "drain_timeout": drain_timeout}
        return Gateway(parse_config({"llmModels": {"m": entry}, "gateway": gateway}, environ={"PATH": "/usr/bin:/bin"}))

    return make


@pytest.fixture
def loading(launched: Any) -> Iterator[int]:
    """The port of a gateway whose model listens, but never becomes ready."""
    with serving(launched("--listen-early", "--never-ready", queue_timeout=0.2)) as port:
        yield port


def with_an_end(gateway: Gateway) -> Any:
    """The gateway, beginning to shut down, in its own event loop, when ``/the-end`` is asked for."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == "/the-end":
            gateway.begin_shutdown()
            scope = {**scope, "path": "/health", "raw_path": b"/health"}
        await gateway(scope, receive, send)

    return app


def url(port: int, path: str) -> str:
    return f"http://127.0.0.1:{port}{path}"


def test_a_request_waits_until_the_model_is_ready(launched: Any, tmp_path: Path) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE))

    with serving(launched("--load-until", str(tmp_path / "loaded"))) as port:
        assert httpx.get(url(port, "/health"), timeout=DEADLINE).status_code == 200
        assert httpx.get(url(port, "/ready"), timeout=DEADLINE).status_code == 503
        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()["queued"] == 1, "it waits")
        (tmp_path / "loaded").touch()
        asking.join(DEADLINE)
        assert answers[0].status_code == 200
        assert httpx.get(url(port, "/ready"), timeout=DEADLINE).json() == {"ready": True, "models": {"m": "ready"}}
        status = httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()
        assert status["pid"] > 0
        assert status["spawns"] == 1


@pytest.mark.parametrize("prefer", ["wait=0", "respond-async, wait=0", 'foo; bar, Wait="0"'])
def test_prefer_wait_0(loading: int, prefer: str) -> None:
    answer = httpx.get(url(loading, "/m/v1/models"), headers={"prefer": prefer}, timeout=DEADLINE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_starting")
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert "x-should-retry" not in answer.headers


def test_queue_timeout(loading: int) -> None:
    answer = httpx.get(url(loading, "/m/v1/models"), timeout=DEADLINE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_starting")


def test_a_client_that_leaves_while_it_waits(launched: Any) -> None:
    with serving(launched("--listen-early", "--never-ready")) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /m/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()["queued"] == 1, "it waits")
        eventually(lambda: httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()["queued"] == 0, "it has left")


def test_a_model_that_does_not_start_says_why(launched: Any) -> None:
    gateway = launched("--crash", "CUDA out of memory, hf_abcdefghijklmnop", max_restarts=1)
    with serving(gateway) as port:
        answer = httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
    error = answer.json()["error"]
    assert error["code"] == "model_failed"
    assert error["message"].startswith("Failed to start LLM model 'm': exited with code 1 after ")
    assert error["message"].endswith("CUDA out of memory, ***")


def test_a_command_that_does_not_exist(launched: Any) -> None:
    with serving(launched(command="/nowhere/vllm")) as port:
        answer = httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE)
        assert answer.json()["error"]["code"] == "model_failed"
        assert "'/nowhere/vllm' does not exist" in answer.json()["error"]["message"]
        assert httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()["reason"] == "command_invalid"


def test_a_crash_under_load_is_visible_and_the_next_request_waits_for_the_restart(launched: Any) -> None:
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 10_000, "stub": {"token-interval": 0.01}}
    crash = {**body, "stub": {"cut-after": 0, "cut-how": "exit"}}
    with serving(launched()) as port, httpx.Client(timeout=DEADLINE) as client:
        with client.stream("POST", url(port, "/m/v1/chat/completions"), json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            killer = threading.Thread(target=send_and_forget, args=(url(port, "/m/v1/chat/completions"), crash))
            killer.start()
            seen: deque[str] = deque()
            with pytest.raises(httpx.TransportError):
                seen.extend(filter(None, lines))
            assert json.loads(seen[-1].removeprefix("data: "))["error"]["code"] == "upstream_disconnected"
        killer.join(DEADLINE)
        statuses: set[int] = set()

        def is_answered() -> bool:
            statuses.add(client.get(url(port, "/m/v1/models")).status_code)
            return 200 in statuses

        eventually(is_answered, "it is back")
        # A request that reached the dying server may have been read by it, so it is not sent again.
        assert statuses <= {200, 502, 503}
        assert client.get(url(port, "/models/m")).json()["spawns"] == 2


def send_and_forget(target: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.TransportError):
        httpx.post(target, json=body, timeout=DEADLINE)


def test_a_server_that_hangs_is_restarted(launched: Any) -> None:
    """Healthy, but it generates nothing."""
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 10, "stub": {"hang-after": 2}}
    with serving(launched(liveness=True, stall_timeout=1)) as port:
        with (
            httpx.stream("POST", url(port, "/m/v1/chat/completions"), json=body, timeout=DEADLINE) as answer,
            # On a machine that is busy for a second its answer may not have begun.
            pytest.raises(httpx.TransportError) if answer.status_code == 200 else contextlib.nullcontext(),
        ):
            answer.read()
        eventually(lambda: httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()["spawns"] > 1, "restarted")
        # There, the next one may look stalled, too.
        eventually(lambda: httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE).status_code == 200, "it is back")


def test_a_stream_that_outlasts_the_drain_is_cut_visibly(launched: Any) -> None:
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 100_000, "stub": {"token-interval": 0.01}}
    gateway = launched(drain_timeout=0.2)
    seen: list[str] = []
    begun = threading.Event()

    def read(port: int) -> None:
        try:
            with httpx.stream("POST", url(port, "/m/v1/chat/completions"), json=body, timeout=DEADLINE) as answer:
                for line in answer.iter_lines():
                    if line:
                        seen.append(line)
                        begun.set()
            seen.append("clean end")
        except httpx.TransportError:
            seen.append("aborted")

    with serving(with_an_end(gateway)) as port:
        reader = threading.Thread(target=read, args=(port,))
        reader.start()
        assert begun.wait(DEADLINE)
        httpx.get(url(port, "/the-end"), timeout=DEADLINE)
        reader.join(DEADLINE)
        late = httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.get(url(port, "/ready"), timeout=DEADLINE).status_code == 503
    assert json.loads(seen[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert seen[-1] == "aborted"


def test_a_stream_that_ends_in_the_drain_is_whole(launched: Any) -> None:
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 30, "stub": {"token-interval": 0.01}}
    gateway = launched()
    with (
        serving(with_an_end(gateway)) as port,
        httpx.stream("POST", url(port, "/m/v1/chat/completions"), json=body, timeout=DEADLINE) as answer,
    ):
        chunks = answer.iter_raw()
        received = next(chunks)
        httpx.get(url(port, "/the-end"), timeout=DEADLINE)
        received += b"".join(chunks)
    assert received.endswith(b"data: [DONE]\n\n")
