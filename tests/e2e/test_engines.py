"""Another engine than vLLM behind the gateway: ``transformers serve``, which knows its model by the path alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from . import test_clients
from .vllm import LOADING, Gateway, Launch, eventually, request

pytestmark = test_clients.pytestmark


@pytest.fixture
def gateway(launch: Callable[[Launch], Gateway]) -> Gateway:
    return launch("transformers")


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key="dummy") as client:
        yield client


def test_it_answers_vllms_client(client: openai.OpenAI) -> None:
    test_clients.test_openai(client)
    test_clients.test_openai_stream(client)


def test_the_names(gateway: Gateway, client: openai.OpenAI, prepared: dict[str, Any]) -> None:
    path = prepared["model"]
    assert [model.id for model in client.models.list()] == ["smol", path]
    # Below the model's own prefix nothing is renamed: the server is asked for what the client says.
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="dummy") as direct:
        answer = direct.chat.completions.create(**test_clients.ASKED | {"model": path})
        assert "Paris" in answer.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as refused:
            direct.chat.completions.create(**test_clients.ASKED)
        assert "pinned" in refused.value.response.json()["detail"]


def test_killed_it_comes_back_and_ended_it_leaves_nothing(gateway: Gateway, client: openai.OpenAI) -> None:
    server = gateway.model_process("transformers serve")
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: gateway.state()["restarts"] == 1, "the end was noticed", 30)
    eventually(lambda: gateway.state()["state"] == "ready", "it is ready again", LOADING)
    assert gateway.model_process("transformers serve") != server
    test_clients.test_openai_stream(client)
    assert gateway.end(signal.SIGTERM) == -signal.SIGTERM


def test_a_killed_gateway_leaves_nothing(gateway: Gateway) -> None:
    gateway.model_process("transformers serve")
    assert request(gateway.port, "GET", "/ready").status == 200
    assert gateway.end(signal.SIGKILL) == -signal.SIGKILL
