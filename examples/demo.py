"""A question to a real model, through the gateway, on a machine without a GPU; or with ``--stub`` to a made-up one.

Standard library only; the gateway is started with ``--python``, an interpreter that has fluidmcp-proxy installed::

    python examples/demo.py            # prepare, start, ask, then serve until Ctrl-C
    python examples/demo.py --once     # end after the answer
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import cpu_model

EXAMPLES = Path(__file__).resolve().parent
QUESTION = "What is the capital of France?"
LOADING = 600.0
"""Seconds within which the model must be ready; 25 to 70 are usual."""
STOPPING = 75.0
"""Seconds that the gateway and its model get to end: the drain, the model's own grace, and a margin."""
CANNOT = 3

NEXT_STEPS = """
The gateway serves on {url} until Ctrl-C. In another terminal:

  curl {url}/smol/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "smol", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  curl {url}/smol/v1/models
  curl {url}/ready

With the OpenAI SDK:

  from openai import OpenAI
  client = OpenAI(base_url="{url}/smol/v1", api_key="dummy")
  messages = [{{"role": "user", "content": "Hello!"}}]
  print(client.chat.completions.create(model="smol", messages=messages).choices[0].message.content)
"""


class Ended(Exception):
    """The gateway or its model ended, or never came up; the message says which."""


# -- the configuration -------------------------------------------------------------------------------------------------


def real_model(cache: Path) -> dict[str, Any]:
    """``cpu-model.json`` with the prepared program and weights in the place of names to be found on PATH and online."""
    prepared = cpu_model.prepare(cache)
    model = _example("cpu-model.json")
    model["command"] = prepared.vllm
    model["args"][1] = prepared.model
    model["env"] = prepared.environment
    return model


def stub_model() -> dict[str, Any]:
    """The same with a program that answers with the question's own words."""
    stub = [str(EXAMPLES / "stub_server.py"), "serve", "stub", "--load-time", "2", "--token-interval", "0.05"]
    model = _example("cpu-model.json")
    model["command"] = sys.executable
    model["args"] = stub + model["args"][2:]
    model["env"] = {}
    return model


def _example(name: str) -> dict[str, Any]:
    model: dict[str, Any] = json.loads((EXAMPLES / name).read_text())["llmModels"]["smol"]
    return model


def write_configuration(model: dict[str, Any], file: Path) -> None:
    """As the only model, ``smol``, on a port that is free now."""
    port = 8001 if port_is_free(8001) else _any_free_port()
    model["args"][model["args"].index("--port") + 1] = str(port)
    model["endpoints"] = {"base_url": f"http://127.0.0.1:{port}/v1"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"llmModels": {"smol": model}}, indent=2))


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _any_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- the gateway -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gateway(python: str, configuration: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """``fluidmcp run`` for the length of the block; its output goes to this terminal.

    In a process group of its own: a Ctrl-C is for this program, which then asks the gateway once, and waits for it.
    """
    command = [python, "-m", "fluidmcp_proxy", "run", str(configuration), "--port", str(port), "--log-level", "warning"]
    say("\n$ fluidmcp " + " ".join(command[3:]))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_end_with_parent)
    try:
        yield process
    finally:
        stop(process)


def _end_with_parent() -> None:
    """In the child: SIGTERM should this program be killed (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then patience: the gateway leaves no process of its model. Each Ctrl-C meanwhile is passed on."""
    deadline = time.monotonic() + STOPPING
    signum: signal.Signals | None = signal.SIGTERM
    while process.poll() is None:
        try:
            if signum is not None:
                process.send_signal(signum)
            signum = None
            process.wait(1)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                signum = signal.SIGKILL  # its guardian clears the model away
        except KeyboardInterrupt:
            signum = signal.SIGINT


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Until the model is ready; `Ended` if it never will be."""
    deadline = time.monotonic() + LOADING
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Ended(f"the gateway ended with exit code {process.returncode}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            state = get(port, "/models/smol")["state"]
            if state == "ready":
                return
            if state == "failed":
                raise Ended("the model did not start; its last lines are above")
        time.sleep(0.3)
    raise Ended(f"the model was not ready within {LOADING:.0f} s")


def get(port: int, path: str) -> dict[str, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer


def ask(port: int, question: str) -> Iterator[str]:
    """The pieces of the answer, as they come."""
    body = {"model": "smol", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/smol/v1/chat/completions", json.dumps(body | {"stream": True}), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Ended(f"the answer is {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            event = line.removeprefix(b"data: ").strip()
            if event == b"[DONE]":
                return
            if event:
                yield _piece(json.loads(event))
    raise Ended("the answer broke off")


def _piece(event: dict[str, Any]) -> str:
    if "error" in event:
        raise Ended(f"the answer broke off: {event['error']['message']}")
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


# -- the tour ----------------------------------------------------------------------------------------------------------


def tour(options: argparse.Namespace, start: float) -> int:
    model = stub_model() if options.stub else real_model(options.cache)
    configuration = options.cache / ("demo-stub.json" if options.stub else "demo.json")
    write_configuration(model, configuration)
    url = f"http://127.0.0.1:{options.port}"
    with gateway(options.python, configuration, options.port) as process:
        wait_until_ready(process, options.port)
        say(f"\nQuestion, to {url}/smol/v1/chat/completions: {options.question}")
        print("Answer:   ", end="", flush=True)
        answer = ""
        for piece in ask(options.port, options.question):
            answer += piece
            print(piece, end="", flush=True)
        say(f"\n          ({time.monotonic() - start:.0f} s after the start of this program)")
        if not answer:
            raise Ended("the answer is empty")
        if not options.once:
            say(NEXT_STEPS.format(url=url))
            serve(process)
    return 0


def serve(process: subprocess.Popen[bytes]) -> None:
    """Until Ctrl-C, which is how it is meant to end."""
    try:
        process.wait()
    except KeyboardInterrupt:
        return
    raise Ended(f"the gateway ended with exit code {process.returncode}")


def say(text: str) -> None:
    print(text, flush=True)


def found_obstacles(options: argparse.Namespace) -> bool:
    """Say what stands in the way of the tour, before anything is downloaded; offer the stub where that would do."""
    if not port_is_free(options.port):
        say(f"Port {options.port} is in use: end what listens there, or choose another --port.")
        return True
    obstacles = [] if options.stub else cpu_model.obstacles(options.cache)
    if not obstacles:
        return False
    say("A real model cannot run here:\n" + "\n".join(f"  * {obstacle}" for obstacle in obstacles))
    say("The same tour with a made-up model needs none of that: add --stub")
    if not sys.stdin.isatty() or input("Take it now? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        return True
    options.stub = True
    return False


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a real model on this machine's CPU, through the gateway.")
    parser.add_argument("--once", action="store_true", help="end after the answer")
    parser.add_argument("--stub", action="store_true", help="with a made-up model: no download, any machine")
    parser.add_argument("--port", type=int, default=8099, help="of the gateway [default: %(default)s]")
    parser.add_argument("--python", default=sys.executable, help="has fluidmcp-proxy installed [default: this one]")
    parser.add_argument("--question", default=QUESTION, help="[default: %(default)s]")
    parser.add_argument(
        "--cache",
        type=Path,
        default=cpu_model.default_cache(),
        help="folder of vLLM and the model [default: %(default)s]",
    )
    return parser.parse_args(arguments)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    start = time.monotonic()
    options = parse()
    options.cache = options.cache.absolute()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        return CANNOT if found_obstacles(options) else tour(options, start)
    except (Ended, cpu_model.Failed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("\nEnded; no process is left.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
