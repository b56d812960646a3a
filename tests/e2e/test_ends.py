"""However the gateway or vLLM ends, no process of vLLM is left, and what can come back does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from .vllm import LOADING, Gateway, Launch, Runner, eventually, request

SIGNALS = [signal.SIGTERM, signal.SIGINT]
TITLES = ["vllm serve", "VLLM::EngineCore", "VLLM::Worker"]


def asked(gateway: Gateway) -> str:
    body = {"model": "smol", "prompt": "One, two,", "max_tokens": 3}
    text: str = request(gateway.port, "POST", "/smol/v1/completions", body).json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("victim", [*TITLES, "guardian"], ids=["api-server", "engine", "worker", "guardian"])
def test_whoever_is_killed_the_rest_is_cleared_away_and_the_model_comes_back(gateway: Gateway, victim: str) -> None:
    before = gateway.model_processes()
    server = gateway.model_process("vllm serve")
    os.kill(server.parent() if victim == "guardian" else gateway.model_process(victim).pid, signal.SIGKILL)
    eventually(lambda: not any(process.is_alive() for process in before), f"{before} are gone", 60)
    eventually(lambda: gateway.state()["state"] == "ready", "it is ready again", LOADING)
    assert gateway.state()["restarts"] >= 1
    assert asked(gateway)
    for name in TITLES:
        assert gateway.model_process(name) not in before


@pytest.mark.parametrize("how", ["run", "uvicorn"])
@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_signal_ends_everything(launch: Callable[[Launch], Gateway], how: Launch, signum: signal.Signals) -> None:
    gateway = launch(how)
    for name in TITLES:
        gateway.model_process(name)
    assert asked(gateway)
    # uvicorn's own command ends with 0 after a SIGINT.
    expected = 0 if (how, signum) == ("uvicorn", signal.SIGINT) else -signum
    assert gateway.end(signum) == expected


def test_killed_gateway_leaves_nothing(gateway: Gateway) -> None:
    for name in TITLES:
        gateway.model_process(name)
    assert gateway.end(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.parametrize("signum", [*SIGNALS, signal.SIGKILL], ids=lambda signum: signum.name)
def test_ending_while_loading_leaves_nothing(runner: Runner, signum: signal.Signals) -> None:
    """In the middle of the start, when some of vLLM's processes are there and do not listen to each other yet."""
    gateway = runner.start("run")

    def has_engine() -> bool:
        assert gateway.process.poll() is None, f"the gateway ended:\n{gateway.tail()}"
        return any("EngineCore" in process.title() for process in gateway.model_processes())

    eventually(has_engine, "the engine starts", 120)
    assert request(gateway.port, "GET", "/ready").status == 503
    gateway.end(signum)
