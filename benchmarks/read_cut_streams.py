"""Reads streams that are cut at given points with the OpenAI SDK; started by truncation.py, in the SDK's environment.

Prints, as JSON, how many raised an error of the SDK (`typed`), another one (`raw`) or none (`complete`), and the names
of the classes."""

from __future__ import annotations

import collections
import json
import sys

import openai


def main() -> None:
    told = json.loads(sys.argv[1])
    client = openai.OpenAI(base_url=told["base_url"], api_key="none", max_retries=0, timeout=30)
    kinds = collections.Counter[str]()
    for number, point in enumerate(told["points"]):
        error = read(client, point, ("fin", "rst")[number % 2], told["tokens"])
        kinds["complete" if error is None else "typed" if isinstance(error, openai.OpenAIError) else "raw"] += 1
        if error is not None:
            kinds[type(error).__name__] += 1
    print(json.dumps(kinds))


def read(client: openai.OpenAI, point: int, how: str, tokens: int) -> Exception | None:
    """The knobs go in the body, since not every proxy passes on a header that it does not know."""
    try:
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "one two three four five"}],
            max_tokens=tokens,
            stream=True,
            extra_body={"stub": {"cut-after": point, "cut-how": how}},
        )
        for _ in stream:
            pass
    except Exception as error:
        return error
    return None


if __name__ == "__main__":
    main()
