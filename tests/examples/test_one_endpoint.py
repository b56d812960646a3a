"""The SDKs on the unified endpoint, with two models behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_examples import environment, on_free_ports, run

__all__ = ["environment"]

openai = pytest.importorskip("openai")

HELLO: Any = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def root(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    config = on_free_ports("two-models.json", tmp_path)
    document = json.loads(config.read_text())
    document["llmModels"]["chat"]["aliases"] = ["gpt-4o", "local/chat"]
    config.write_text(json.dumps(document))
    with run(environment, config) as port:
        yield f"http://127.0.0.1:{port}"


def test_openai(root: str) -> None:
    with openai.OpenAI(base_url=f"{root}/v1", api_key="dummy", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names == [
            "chat",
            "gpt-4o",
            "local/chat",
            "Qwen/Qwen2.5-1.5B-Instruct",
            "embed",
            "BAAI/bge-small-en-v1.5",
        ]
        for name in names[:4]:
            answer = client.chat.completions.create(model=name, messages=HELLO)
            assert answer.model == "Qwen/Qwen2.5-1.5B-Instruct"
            chunks = list(client.chat.completions.create(model=name, messages=HELLO, stream=True))
            assert "Hello!" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert client.models.retrieve(name).model_extra["model_id"] == "chat"
            sound = ("a.wav", b"RIFF" * 50_000, "audio/wav")
            assert client.audio.transcriptions.create(model=name, file=sound).text == "200000 bytes of sound."
        assert client.completions.create(model="embed", prompt="x").model == "BAAI/bge-small-en-v1.5"
        with pytest.raises(openai.NotFoundError, match="chat, embed, gpt-4o, local/chat"):
            client.chat.completions.create(model="nobody", messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("no/body")


def test_anthropic(root: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=root, api_key="dummy", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "gpt-4o", "messages": HELLO, "max_tokens": 30}
        assert "Hello!" in client.messages.create(**asked).content[0].text
        with client.messages.stream(**asked) as stream:
            assert "Hello!" in "".join(stream.text_stream)
        with pytest.raises(anthropic.NotFoundError, match="nobody"):
            client.messages.create(**{**asked, "model": "nobody"})
