"""A stream that the server cuts, read by the OpenAI SDK: an error of the SDK's own, every time, or a silent loss?

Each of the points is a number of bytes of the answer's body, from the first to the last before `[DONE]`; the server
closes in good form and by reset, by turns.
"""

from __future__ import annotations

import collections
import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from machine import CHAT, ROOT, DidNotStart, Machine, free_port
from peers import PEERS, Proxy, environment, everyone
from row import Row, Scale

POINTS, TOKENS = 100, 20
MESSAGES = [{"role": "user", "content": "one two three four five"}]
WITH_SDK = ROOT / "benchmarks" / "read_cut_streams.py"
OTHERS = ("nginx", "vllm-router", "caddy", "smg", "production-stack", "LiteLLM")


def cut_streams(here: Machine, scale: Scale) -> list[Row]:
    if scale.install and (problem := environment("openai", "openai")):
        raise OSError(f"the OpenAI SDK {problem}")
    points, proxies = scale.of(POINTS), [one for one in everyone(install=False) if not one.missing]
    own = next(one for one in proxies if one.name.startswith("fluidmcp"))
    kinds, beside = _read_through(here, own, points), []
    for proxy in proxies:
        if not proxy.name.startswith(OTHERS):
            continue
        try:
            beside.append(f"{proxy.name}: {_told(_read_through(here, proxy, points))}")
        except (DidNotStart, subprocess.SubprocessError) as error:
            print(f"{proxy.name}: {error}", file=sys.stderr)
    what = f"a stream cut at {points} points, read with the OpenAI SDK"
    return [
        Row(
            what,
            f"{points} typed errors",
            f"openai {_sdk_version()}: {_told(kinds)}",
            "; ".join(beside),
            kinds["typed"] == points,
        )
    ]


def _read_through(here: Machine, proxy: Proxy, points: int) -> collections.Counter[str]:
    with (
        _stub(here) as upstream,
        here.running(proxy.command(port := free_port(), upstream, here.folder), here.proxy_core, port),
    ):
        length, base = _length(upstream), proxy.path.removesuffix("/chat/completions")
        where = [1 + (length - 1) * point // points for point in range(points)]
        told = json.dumps({"base_url": f"http://127.0.0.1:{port}{base}", "points": where, "tokens": TOKENS})
        program = [str(PEERS / "openai" / "bin" / "python"), str(WITH_SDK), told]
        done = subprocess.run(here.loading(*program), stdout=subprocess.PIPE, check=True, timeout=600)
    return collections.Counter(json.loads(done.stdout))


@contextlib.contextmanager
def _stub(here: Machine) -> Iterator[int]:
    stub = [sys.executable, str(ROOT / "examples" / "stub_server.py"), "serve", "m", "--port", str(port := free_port())]
    with here.running([*stub, "--token-interval", "0.002"], here.load_core, port):
        yield port


def _length(upstream: int) -> int:
    """Bytes of the body before `[DONE]`."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "max_tokens": TOKENS, "stream": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{upstream}{CHAT}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return int(answer.read().index(b"data: [DONE]"))


def _told(kinds: collections.Counter[str]) -> str:
    """The sorts first, the SDK's or others' classes after them."""
    sorts = ", ".join(f"{kinds[sort]} {sort}" for sort in ("typed", "raw", "complete"))
    classes = ", ".join(f"{count} {name}" for name, count in kinds.most_common() if name[0].isupper())
    return f"{sorts} ({classes})" if classes else sorts


def _sdk_version() -> str:
    command = [str(PEERS / "openai" / "bin" / "python"), "-c", "import openai; print(openai.__version__)"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
