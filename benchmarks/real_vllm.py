"""A real vLLM on the CPU, launched by the gateway: tokens a second through the gateway, and from vLLM itself."""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from machine import CHAT, QUESTION, ROOT, DidNotStart, Machine, free_port
from row import Row, Scale

sys.path.append(str(ROOT / "examples"))
import cpu_model
import demo

STREAMS, TOKENS, PAIRS = 32, 64, 5
LOADING = 600.0
LEAST = 0.98


def real_vllm(here: Machine, scale: Scale) -> list[Row]:
    cache = cpu_model.default_cache()
    if obstacles := cpu_model.obstacles(cache):
        raise DidNotStart("; ".join(obstacles))
    file = here.folder / "real.json"
    demo.write_configuration(demo.real_model(cache), file)
    server = int(json.loads(file.read_text())["llmModels"]["smol"]["endpoints"]["base_url"].split(":")[2].split("/")[0])
    command = [sys.executable, "-m", "fluidmcp_proxy", "run", str(file), "--port", str(port := free_port())]
    with here.running(command, None, port):
        _wait_until_ready(port)
        tokens_a_second(server, CHAT)  # warm
        pairs = [(tokens_a_second(server, CHAT), tokens_a_second(port, "/smol" + CHAT)) for _ in range(scale.of(PAIRS))]
    ratio = statistics.median(through / direct for direct, through in pairs)
    what = f"vLLM on the CPU, {STREAMS} streams of {TOKENS} tokens: tokens/s"
    through, direct = (statistics.median(pair[side] for pair in pairs) for side in (1, 0))
    spread = ", ".join(f"{pair[1] / pair[0]:.3f}" for pair in pairs)
    gateway = f"{through:.1f}/s; {ratio:.3f} of direct (median of {spread})"
    return [
        Row(
            what,
            f"at least {LEAST} of direct",
            gateway,
            f"vLLM {cpu_model.VLLM} itself: {direct:.1f}/s",
            ratio >= LEAST,
        )
    ]


def _wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + LOADING
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/ready")
        if connection.getresponse().status == 200:
            return
        connection.close()
        time.sleep(0.5)
    raise DidNotStart("the model did not load in time")


def tokens_a_second(port: int, path: str) -> float:
    """All streams begin at once; the last one's end ends it."""
    together = threading.Barrier(STREAMS + 1)
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(_read, port, path, number, together) for number in range(STREAMS)]
        together.wait()
        began = time.monotonic()
        tokens = sum(stream.result() for stream in streams)
    return tokens / (time.monotonic() - began)


def _read(port: int, path: str, number: int, together: threading.Barrier) -> int:
    message = {"role": "user", "content": f"{QUESTION} ({number})"}
    asked: dict[str, object] = {"model": "smol", "messages": [message], "max_tokens": TOKENS, "ignore_eos": True}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    together.wait()
    connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise OSError(f"status {answer.status}")
    lines = answer.read().splitlines()
    connection.close()
    if b"data: [DONE]" not in lines:
        raise OSError("a stream did not end")
    last = json.loads(lines[lines.index(b"data: [DONE]") - 2].removeprefix(b"data: "))
    return int(last["usage"]["completion_tokens"])
