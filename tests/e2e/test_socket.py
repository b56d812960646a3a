"""A vLLM that nobody has given a port: on a Unix socket of the gateway's, at each start a new one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from .vllm import LOADING, Gateway, Launch, events, eventually, request

CHAT = {
    "model": "smol",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 12,
}


def socket_of(gateway: Gateway) -> Path:
    kind, _, path = gateway.state()["address"].partition(":")
    assert kind == "unix"
    return Path(path)


def test_without_a_port(launch: Callable[[Launch], Gateway]) -> None:
    gateway = launch("socket")
    path = socket_of(gateway)
    assert path.is_socket()
    assert "Paris" in request(gateway.port, "POST", "/smol/v1/chat/completions", CHAT).body.decode()
    stream = request(gateway.port, "POST", "/smol/v1/chat/completions", {**CHAT, "stream": True}).body
    assert len(list(events(stream))) > 3
    assert stream.endswith(b"data: [DONE]\n\n")

    os.kill(gateway.model_process("vllm serve").pid, signal.SIGKILL)
    eventually(lambda: not path.exists(), "the socket's file is gone", 60)
    eventually(lambda: gateway.state()["state"] == "ready", "it is ready again", LOADING)
    assert socket_of(gateway) != path
    assert "Paris" in request(gateway.port, "POST", "/smol/v1/chat/completions", CHAT).body.decode()

    path = socket_of(gateway)
    assert gateway.end(signal.SIGTERM) == -signal.SIGTERM
    assert not path.exists()
