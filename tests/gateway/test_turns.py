"""Waiting for a turn over HTTP: on demand, in a group, under a limit; with real servers."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from tests.gateway.conftest import remote
from tests.serving import DEADLINE, STUB, eventually, free_port, serving

Make = Callable[..., Gateway]


@pytest.fixture
def launching(tmp_path: Path) -> Make:
    """A gateway that launches the stub server for each of these models; the keys are theirs."""

    def make(*arguments: str, **models: dict[str, Any]) -> Gateway:
        entries = {}
        for name, keys in models.items():
            args = ["-S", "-E", str(STUB), "serve", name, "--port", str(free_port()), *arguments]
            entries[name] = {"command": sys.executable, "args": args, "stop_timeout": 5, **keys}
        settings = {"log_dir": str(tmp_path / "log"), "runtime_dir": str(tmp_path / "run")}
        return Gateway(parse_config({"llmModels": entries, "gateway": settings}, environ={"PATH": "/usr/bin:/bin"}))

    return make


def url(port: int, path: str) -> str:
    return f"http://127.0.0.1:{port}{path}"


def status(port: int, model: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(url(port, f"/models/{model}"), timeout=DEADLINE).json()
    return answer


def test_a_model_on_demand_is_started_by_its_first_request(launching: Make) -> None:
    with serving(launching(m={"start": "on_demand"})) as port:
        assert httpx.get(url(port, "/ready"), timeout=DEADLINE).json() == {"ready": True, "models": {"m": "stopped"}}
        assert status(port, "m")["spawns"] == 0
        assert httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE).status_code == 200
        assert status(port, "m")["spawns"] == 1


def test_a_client_that_polls_gets_it_loaded(launching: Make) -> None:
    with serving(launching("--load-time", "0.3", m={"start": "on_demand"})) as port:

        def ask() -> httpx.Response:
            return httpx.get(url(port, "/m/v1/models"), headers={"prefer": "wait=0"}, timeout=DEADLINE)

        first = ask()
        assert (first.status_code, first.json()["error"]["code"]) == (503, "model_starting")
        assert first.headers["retry-after"] == "5"
        eventually(lambda: ask().status_code == 200, "loaded")
        assert status(port, "m")["spawns"] == 1


def test_a_load_ends_with_the_client_that_wanted_it(launching: Make) -> None:
    with serving(launching("--never-ready", m={"start": "on_demand"})) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /m/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: status(port, "m")["pid"], "it is being started")
        eventually(lambda: status(port, "m")["state"] == "stopped", "given up")


def test_an_idle_model_is_stopped_and_comes_back(launching: Make) -> None:
    with serving(launching(m={"idle_timeout": 0.3})) as port:
        eventually(lambda: (told := status(port, "m"))["spawns"] == 1 and told["state"] == "stopped", "idle")
        assert httpx.get(url(port, "/ready"), timeout=DEADLINE).status_code == 200
        assert httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE).status_code == 200
        assert status(port, "m")["spawns"] == 2


def test_a_stream_is_not_interrupted_by_the_turn_of_another_model(launching: Make, tmp_path: Path) -> None:
    stub = {"hang-after": 2, "hang-until": str(tmp_path / "go")}
    body = {"model": "a", "messages": [], "stream": True, "max_tokens": 40, "stub": stub}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.get(url(port, "/b/v1/models"), timeout=DEADLINE))

    with serving(launching(a={"group": "g", "start": "eager"}, b={"group": "g"})) as port:
        eventually(
            lambda: httpx.get(url(port, "/ready"), timeout=DEADLINE).json()["models"] == {"a": "ready", "b": "stopped"},
            "ready",
        )
        with httpx.stream("POST", url(port, "/a/v1/chat/completions"), json=body, timeout=DEADLINE) as stream:
            chunks = stream.iter_raw()
            received = next(chunks)
            other = threading.Thread(target=ask)
            other.start()
            eventually(lambda: status(port, "b")["queued"] == 1, "b is waited for")
            (tmp_path / "go").touch()
            received += b"".join(chunks)
        other.join(DEADLINE)
        assert received.endswith(b"data: [DONE]\n\n")
        assert received.count(b"data: ") > 40
        assert answers[0].status_code == 200
        assert httpx.get(url(port, "/ready"), timeout=DEADLINE).json() == {
            "ready": True,
            "models": {"a": "stopped", "b": "ready"},
        }


def test_a_place_is_held_to_the_last_byte_and_a_full_queue_is_told(upstream: int) -> None:
    body = {"model": "m", "messages": [], "stream": True, "max_tokens": 9, "stub": {"hang-after": 2}}
    with serving(remote(upstream, max_concurrency=1, max_queue=1)) as port:
        with httpx.stream("POST", url(port, "/m/v1/chat/completions"), json=body, timeout=DEADLINE) as stream:
            chunks = stream.iter_raw()  # closes the stream when it is not referred to any more
            next(chunks)
            waiting = socket.create_connection(("127.0.0.1", port))
            waiting.sendall(b"GET /m/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: status(port, "m")["queued"] == 1, "one waits")
            refused = httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            waiting.close()
            eventually(lambda: status(port, "m")["queued"] == 0, "it has left the queue")
            assert status(port, "m")["in_flight"] == 1
        assert httpx.get(url(port, "/m/v1/models"), timeout=DEADLINE).status_code == 200  # the client has left
        eventually(lambda: status(port, "m")["in_flight"] == 0, "the last one is over")


def test_the_hosts_own_client_waits_for_its_turn_too(launching: Make) -> None:
    gateway = launching(a={"group": "g"}, b={"group": "g"})

    async def ask(name: str) -> int:
        return (await gateway.client(name).get("/models")).status_code

    from starlette.testclient import TestClient

    with TestClient(gateway) as client:
        assert client.portal is not None
        assert [client.portal.call(ask, name) for name in ("a", "b", "a")] == [200, 200, 200]
        assert client.get("/models/a").json()["spawns"] == 2
