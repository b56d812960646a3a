"""The SDKs that people use, unchanged, pointed at the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import anyio
import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI

from .vllm import Gateway, eventually, request

# The SDKs' own deprecations are not this project's business.
pytestmark = pytest.mark.filterwarnings("default")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASKED: dict[str, Any] = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 30}
LONG: dict[str, Any] = {
    "model": "smol",
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": 900,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="dummy") as client:
        yield client


@pytest.fixture
def async_client(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="dummy")


def test_openai(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0
    assert answer._request_id


def test_openai_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len(chunks) > 3


def test_openai_other_endpoints(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smol"]
    assert client.completions.create(model="smol", prompt="One, two,", max_tokens=5).choices[0].text
    assert client.responses.create(model="smol", input="Hello!", max_output_tokens=10).output_text
    with client.responses.stream(model="smol", input="Hello!", max_output_tokens=10) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "response.output_text.delta" in kinds


def test_openai_error_is_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="wrong"):
        client.chat.completions.create(model="wrong", messages=QUESTION)


def test_openai_stream_cancelled_half_way(gateway: Gateway, client: openai.OpenAI) -> None:
    before = gateway.generated()
    with client.chat.completions.create(**LONG, stream=True) as stream:
        for number, _chunk in enumerate(stream):
            if number == 20:
                break
        assert gateway.running() == 1
    eventually(lambda: gateway.running() == 0, "the cancelled generation has ended", 30)
    assert gateway.generated() - before < LONG["max_tokens"], "it was finished, not aborted"


@pytest.mark.anyio
async def test_openai_async(async_client: openai.AsyncOpenAI) -> None:
    async with async_client:
        answer = await async_client.chat.completions.create(**ASKED)
        assert "Paris" in answer.choices[0].message.content
        stream = await async_client.chat.completions.create(**ASKED, stream=True)
        assert "Paris" in "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


@pytest.mark.anyio
async def test_openai_async_cancelled(gateway: Gateway, async_client: openai.AsyncOpenAI) -> None:
    before = gateway.generated()
    async with async_client, anyio.create_task_group() as tasks:

        async def ask() -> None:
            await async_client.chat.completions.create(**LONG)

        tasks.start_soon(ask)
        await anyio.to_thread.run_sync(lambda: eventually(lambda: gateway.running() == 1, "it generates", 60))
        tasks.cancel_scope.cancel()
    eventually(lambda: gateway.running() == 0, "the cancelled generation has ended", 30)
    assert gateway.generated() - before < LONG["max_tokens"], "it was finished, not aborted"


def test_langchain(gateway: Gateway) -> None:
    chat = ChatOpenAI(model="smol", base_url=f"{gateway.url}/v1", api_key="dummy", temperature=0, max_tokens=30)
    assert "Paris" in chat.invoke("What is the capital of France?").content
    pieces = [piece.content for piece in chat.stream("What is the capital of France?")]
    assert "Paris" in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_litellm(gateway: Gateway) -> None:
    asked = ASKED | {"model": "openai/smol", "api_base": f"{gateway.url}/v1", "api_key": "dummy"}
    assert "Paris" in litellm.completion(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert "Paris" in "".join(pieces)


def test_anthropic(gateway: Gateway) -> None:
    asked = {"model": "smol", "messages": QUESTION, "max_tokens": 30, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=gateway.url, api_key="dummy") as client:
        assert "Paris" in client.messages.create(**asked).content[0].text
        with client.messages.stream(**asked) as stream:
            assert "Paris" in "".join(stream.text_stream)


def test_one_endpoint(gateway: Gateway) -> None:
    root = f"http://127.0.0.1:{gateway.port}"
    with openai.OpenAI(base_url=f"{root}/v1", api_key="dummy") as client:
        assert "Paris" in client.chat.completions.create(**ASKED).choices[0].message.content
        assert "smol" in [model.id for model in client.models.list()]
        assert client.models.retrieve("smol").model_extra["state"] == "ready"
    with anthropic.Anthropic(base_url=root, api_key="dummy") as client:
        answer = client.messages.create(model="smol", messages=QUESTION, max_tokens=30, extra_body={"temperature": 0})
        assert "Paris" in answer.content[0].text


def test_clients_leave_nothing_running(gateway: Gateway) -> None:
    assert gateway.running() == 0
    state = request(gateway.port, "GET", "/models/smol").json()
    assert (state["in_flight"], state["queued"]) == (0, 0)
