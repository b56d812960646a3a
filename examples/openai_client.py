"""The OpenAI SDK against the gateway: `pip install openai`, then `python openai_client.py [BASE_URL] [MODEL]`.

Uses the API of `vllm-config.json`: a chat, a chat with a system prompt, and a stream.
"""

import sys

from openai import OpenAI


def main(base_url: str = "http://localhost:8099/vllm/v1", model: str = "facebook/opt-125m") -> None:
    client = OpenAI(base_url=base_url, api_key="dummy")  # the SDK wants a key; the gateway does not

    response = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is Python?"}], max_tokens=100
    )
    print(response.choices[0].message.content)

    response = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "You are a coding assistant."},
            {"role": "user", "content": "How do I sort a list in Python?"},
        ],
        temperature=0.3,
        max_tokens=200,
    )
    print(response.choices[0].message.content)

    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=100, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
