"""What comes through the gateway is what vLLM says, byte for byte except ids and times."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from typing import Any

import httpx
import pytest

from .vllm import Answer, Gateway, comparable, events, request

SYSTEM = [
    {"role": "system", "content": "You are a coding assistant."},
    {"role": "user", "content": "How do I sort a list in Python?"},
]
CHAT = {"model": "smol", "messages": SYSTEM, "temperature": 0, "max_tokens": 40}
CAPITAL = {**CHAT, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
CASES: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", CHAT),
    (
        "POST",
        "/v1/chat/completions",
        {**CHAT, "logprobs": True, "top_logprobs": 3, "n": 2, "seed": 1, "temperature": 0.5, "max_tokens": 6},
    ),
    ("POST", "/v1/completions", {"model": "smol", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 40}),
    ("POST", "/v1/completions", {"model": "smol", "prompt": ["ü", "日本語"], "temperature": 0, "max_tokens": 12}),
    ("POST", "/v1/responses", {"model": "smol", "input": "Hello!", "temperature": 0, "max_output_tokens": 20}),
    ("POST", "/v1/messages", {"model": "smol", "messages": SYSTEM[1:], "temperature": 0, "max_tokens": 20}),
    ("POST", "/v1/messages/count_tokens", {"model": "smol", "messages": SYSTEM[1:]}),
    ("POST", "/tokenize", {"model": "smol", "prompt": "Hello, world!"}),
    ("POST", "/detokenize", {"model": "smol", "tokens": [19556, 28, 905]}),
    ("GET", "/v1/models", None),
    ("POST", "/v1/chat/completions", {**CHAT, "model": "no-such-model"}),
    ("POST", "/v1/chat/completions", {**CHAT, "max_tokens": -1}),
    ("POST", "/v1/chat/completions", b'{"model": "smol", '),
    ("GET", "/v1/no/such/path", None),
    ("GET", "/v1/chat/completions", None),
]


def both(gateway: Gateway, method: str, path: str, body: object) -> tuple[Answer, Answer]:
    """vLLM's own answer and the gateway's. It is asked twice: an uncached prefill may round differently."""
    request(gateway.vllm_port, method, path, body)
    return request(gateway.vllm_port, method, path, body), request(gateway.port, method, f"/smol{path}", body)


@pytest.mark.parametrize(("method", "path", "body"), CASES)
def test_same_answer(gateway: Gateway, method: str, path: str, body: Any) -> None:
    own, through = both(gateway, method, path, body)
    assert through.status == own.status
    assert comparable(through.body) == comparable(own.body)
    for name in ("content-type", "content-length", "allow"):
        if name != "content-length" or b'"id"' not in own.body:
            assert through.headers.get(name) == own.headers.get(name)


def test_cases_cover_successes_and_errors(gateway: Gateway) -> None:
    """So that the comparison above is not one of errors with errors."""
    statuses = [request(gateway.vllm_port, *case).status for case in CASES]
    assert statuses == [200] * 10 + [404, 400, 400, 404, 405]


def test_real_answer(gateway: Gateway) -> None:
    answer = request(gateway.port, "POST", "/smol/v1/chat/completions", CAPITAL)
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_wrong_model_is_vllms_404(gateway: Gateway) -> None:
    error = request(gateway.port, "POST", "/smol/v1/chat/completions", {**CHAT, "model": "wrong"}).json()["error"]
    assert error["type"] == "NotFoundError"
    assert "`wrong`" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        (
            "/v1/completions",
            {"model": "smol", "prompt": "One, two,", "temperature": 0, "max_tokens": 40, "stream": True},
        ),
    ],
)
def test_same_stream(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    own, through = both(gateway, "POST", path, body)
    assert through.status == own.status == 200
    assert through.headers["content-type"] == own.headers["content-type"]
    assert through.body.endswith(b"data: [DONE]\n\n")
    assert text(through.body) == text(own.body) != ""
    assert [event.get("usage") for event in events(through.body)][-1] == [
        event.get("usage") for event in events(own.body)
    ][-1]
    # vLLM puts two tokens into one event when it is faster than its reader, so events are compared without their text.
    assert shapes(through.body) == shapes(own.body)


def text(body: bytes) -> str:
    choices = [choice for event in events(body) for choice in event["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def shapes(body: bytes) -> set[bytes]:
    """The different lines of a stream, less ids, times, and text."""
    return {comparable(json.dumps(_emptied(event), separators=(",", ":")).encode()) for event in events(body)}


def _emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "" if key in ("content", "text") else _emptied(inner) for key, inner in value.items()}
    return [_emptied(inner) for inner in value] if isinstance(value, list) else value


def test_stream_arrives_as_it_is_generated(gateway: Gateway) -> None:
    """Each time some of the answer has come, vLLM is still at work on the rest."""
    body = {**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=120)
    connection.request("POST", "/smol/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    received = 0
    for expected in (1, 40, 80):
        while received < expected:
            received += response.readline().startswith(b"data: {")
        assert gateway.running() == 1
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_curl_as_in_the_documentation(gateway: Gateway) -> None:
    curl = shutil.which("curl")
    assert curl, "the documentation's examples need curl"
    url = f"{gateway.url}/v1/chat/completions"
    command = [curl, "-sS", "-X", "POST", url, "-H", "Content-Type: application/json", "-d", json.dumps(CHAT)]
    answer = subprocess.run(command, capture_output=True, check=True).stdout
    own, _ = both(gateway, "POST", "/v1/chat/completions", CHAT)
    assert comparable(answer) == comparable(own.body)


def test_plain_httpx(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "smol"
        assert client.post("/tokenize", json={"prompt": "Hello"}).json()["count"] == 1
        with client.stream("POST", "/v1/chat/completions", json={**CAPITAL, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert "Paris" in text("\n".join(lines).encode())
