"""A client that leaves stops the work that vLLM does for it, before and after the first byte."""

from __future__ import annotations

import http.client
import json

import pytest

from .vllm import Gateway, eventually

LONG = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}
SOON = 5.0
"""Seconds. It takes a fraction of one; left alone, the generation would go on for more than ten, and not be aborted."""


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "not-streamed"])
@pytest.mark.parametrize("clients", [1, 8])
def test_leaving_aborts_the_generation(gateway: Gateway, stream: bool, clients: int) -> None:
    aborted = gateway.aborted()
    connections = [http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=120) for _ in range(clients)]
    for connection in connections:
        body = json.dumps(LONG | {"stream": stream})
        connection.request("POST", "/smol/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        for connection in connections:
            assert connection.getresponse().readline().startswith(b"data: {")
    eventually(lambda: gateway.running() == clients, "vLLM works for all of them", 30)
    for connection in connections:
        connection.sock.close() if connection.sock else None
        connection.close()
    eventually(lambda: gateway.running() == 0, "vLLM works for none of them", SOON)
    eventually(lambda: gateway.aborted() == aborted + clients, "all of them were aborted", SOON)
    eventually(lambda: gateway.state()["in_flight"] == 0, "the gateway has forgotten them, too", SOON)
