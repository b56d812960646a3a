"""A client that leaves stops the work that vLLM does for it, before and after the first byte."""

from __future__ import annotations

import http.client
import json

import pytest

from .vllm import Gateway, eventually

LENGTH = 900
"""Tokens of each answer: ten seconds and more."""
LONG = {"model": "smol", "prompt": "Once upon a time", "max_tokens": LENGTH, "ignore_eos": True}
SOON = 30.0
"""Seconds. It takes 0.2 on a quiet machine; whether they were aborted is told by what was generated."""


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "not-streamed"])
@pytest.mark.parametrize("clients", [1, 8])
def test_leaving_aborts_the_generation(gateway: Gateway, stream: bool, clients: int) -> None:
    before = gateway.generated()
    connections = [http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=120) for _ in range(clients)]
    for connection in connections:
        body = json.dumps(LONG | {"stream": stream})
        connection.request("POST", "/smol/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        for connection in connections:
            assert connection.getresponse().readline().startswith(b"data: {")
    eventually(lambda: gateway.running() == clients, "vLLM works for all of them", 30)
    for connection in connections:
        connection.close()
    eventually(lambda: gateway.running() == 0, "vLLM works for none of them", SOON)
    assert gateway.generated() - before < clients * LENGTH, "all were finished, not aborted"
    eventually(lambda: gateway.state()["in_flight"] == 0, "the gateway has forgotten them, too", SOON)
