"""What it costs when models take turns, and whether everyone gets one.

`python benchmarks/swapping.py` lets two stub models of a group, which load for `--load-time` seconds, take turns: by
stop and start, and by sleep and wake. `--config FILE` measures the first two models of a file of yours instead (vLLMs
that sleep on a GPU, say). `--clients 8 --seconds 300` has that many clients ask two models in turn, `--ungrouped` side
by side; with `--real` these are two vLLMs of the CPU build, as `examples/cpu_model.py` prepares it. Exit code 1 if a
request was not answered, if both were up at once, or if there were more swaps than turns need.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "examples" / "stub_server.py"
PATIENCE = 600.0


@dataclass
class House:
    """A gateway and two of its models, by id; their names in requests, and a marker in each one's environment."""

    port: int
    models: dict[str, str]
    markers: dict[str, str]
    answers: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    both_up: int = 0

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            headers = {"content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def ask(self, model: str) -> None:
        """A short chat; counts the answer and the time until it."""
        messages = [{"role": "user", "content": "Say hello."}]
        began = time.perf_counter()
        status, _ = self.request(
            "POST",
            f"/{model}/v1/chat/completions",
            {"model": self.models[model], "messages": messages, "max_tokens": 8},
        )
        self.seconds.append(time.perf_counter() - began)
        self.answers[status] += 1

    def status(self, model: str) -> dict[str, Any]:
        told: dict[str, Any] = self.request("GET", f"/models/{model}")[1]
        return told

    def watch(self, over: threading.Event) -> None:
        """Count the moments at which both have processes, as seen from outside."""
        while not over.wait(0.1):
            self.both_up += all(alive(marker) for marker in self.markers.values())


def alive(marker: str) -> bool:
    """Whether a process has ``marker`` in its environment; a zombie has none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                return True
        except OSError:
            continue
    return False


@contextmanager
def gateway(models: dict[str, dict[str, Any]], folder: Path) -> Iterator[House]:
    """`fluidmcp run` with these entries; the first two are measured."""
    markers = {name: f"swapping-{uuid.uuid4().hex}" for name in models}
    for name, entry in models.items():
        entry["env"] = {**entry.get("env", {}), "SWAPPING": markers[name]}
    port = free_port()
    settings = {"log_dir": str(folder / "log"), "runtime_dir": str(folder / "run"), "port": port}
    config = folder / "models.json"
    config.write_text(json.dumps({"llmModels": models, "gateway": settings}))
    with open(folder / "gateway.log", "ab") as log:
        command = [sys.executable, "-m", "fluidmcp_proxy", "run", str(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    first = list(models)[:2]
    names = {name: served(name, models[name]) for name in first}
    house = House(port, names, {name: markers[name] for name in first})
    try:
        wait_for_health(house, process, folder)
        yield house
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def wait_for_health(house: House, process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            if house.request("GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            sys.exit((folder / "gateway.log").read_text())
        time.sleep(0.05)


def served(name: str, entry: dict[str, Any]) -> str:
    """The name that the model's server knows."""
    args = entry["args"]
    if "--served-model-name" in args:
        return str(args[args.index("--served-model-name") + 1])
    return str(args[args.index("serve") + 1]) if "serve" in args else name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def stubs(load_time: float, sleep: int | None, group: str | None) -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for name in ("a", "b"):
        args = ["-S", "-E", str(STUB), "serve", name, "--port", str(free_port()), "--load-time", str(load_time)]
        # As vLLM on an H100 does with a 7B model
        args += ["--enable-sleep-mode", "--sleep-time", "0.4", "--token-interval", "0.005"]
        models[name] = {"command": sys.executable, "args": args, "start": "on_demand", "group": group, "sleep": sleep}
    return models


def real(group: str | None) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "examples" / "cpu_model.py"), "--json"]
    prepared = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    models: dict[str, dict[str, Any]] = {}
    for name in ("smol", "other"):
        args = ["serve", prepared["model"], "--port", str(free_port()), "--host", "127.0.0.1", "--enforce-eager"]
        args += ["--served-model-name", name, "--max-model-len", "1024"]
        entry = {"command": prepared["vllm"], "args": args, "env": prepared["environment"], "stop_timeout": 10}
        models[name] = {**entry, "start": "on_demand", "group": group}
    return models


def measure_swaps(models: dict[str, dict[str, Any]], count: int) -> list[float]:
    """Seconds from asking for the one, while the other is ready, to the answer."""
    with tempfile.TemporaryDirectory() as folder, gateway(models, Path(folder)) as house:
        first, second = house.models
        for model in (first, second):  # both have been loaded once: what follows is the same each time
            house.ask(model)
        house.seconds.clear()
        for number in range(count):
            house.ask((first, second)[number % 2])
        assert set(house.answers) == {200}, house.answers
        return house.seconds


def run_clients(models: dict[str, dict[str, Any]], clients: int, seconds: float) -> int:
    """Clients that ask two models in turn, each as soon as it has its answer."""
    grouped = all(entry["group"] for entry in models.values())
    with tempfile.TemporaryDirectory() as folder, gateway(models, Path(folder)) as house:
        end, over = time.monotonic() + seconds, threading.Event()

        def client(number: int) -> None:
            names = list(house.models)
            while time.monotonic() < end:
                house.ask(names[number % 2])
                number += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        watcher = threading.Thread(target=house.watch, args=(over,))
        for thread in (*threads, watcher):
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        watcher.join()
        told = [house.status(name) for name in house.models]
    starts = sum(status["spawns"] for status in told)
    answered = sum(house.answers.values())
    print(f"{clients} clients, {seconds:g} s, {'one group' if grouped else 'side by side'}: {answered} requests,")
    print(f"  answered with {dict(house.answers)}; {starts} starts; both up at {house.both_up} moments;")
    print(f"  seconds a request: median {statistics.median(house.seconds):.1f}, worst {max(house.seconds):.1f};")
    print(f"  still inside or waiting: {[status['in_flight'] + status['queued'] for status in told]}")
    # Whoever waits is let in after a swap, and in the end each client has a request that it waits for.
    needless = grouped and answered < clients / 2 * (starts - 2)
    wrong = set(house.answers) != {200} or (grouped and house.both_up > 0) or needless
    return 1 if wrong or any(status["in_flight"] + status["queued"] for status in told) else 0


def compare(options: argparse.Namespace) -> int:
    if options.config:
        models = json.loads(options.config.read_text())["llmModels"]
        report("as configured", measure_swaps(models, options.swaps))
        return 0
    stopped = measure_swaps(stubs(options.load_time, None, "g"), options.swaps)
    slept = measure_swaps(stubs(options.load_time, 1, "g"), options.swaps)
    report(f"stop and start, loading for {options.load_time:g} s", stopped)
    report("sleep and wake", slept)
    ratio = statistics.median(stopped) / statistics.median(slept)
    print(f"sleep and wake are {ratio:.1f} times as fast")
    return 0 if ratio >= 5 else 1


def report(what: str, seconds: list[float]) -> None:
    print(f"{what}: {len(seconds)} swaps, median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="measure the swaps of this file's first two models")
    parser.add_argument("--swaps", type=int, default=10, help="how many to measure [default: %(default)s]")
    parser.add_argument("--load-time", type=float, default=10.0, help="of the stub, in seconds [default: %(default)s]")
    parser.add_argument("--clients", type=int, help="have so many clients ask two models in turn instead")
    parser.add_argument("--seconds", type=float, default=300.0, help="for so long [default: %(default)s]")
    parser.add_argument("--ungrouped", action="store_true", help="the two models side by side")
    parser.add_argument("--real", action="store_true", help="two vLLMs of the CPU build")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    if not options.clients:
        return compare(options)
    group = None if options.ungrouped else "g"
    models = real(group) if options.real else stubs(options.load_time, None, group)
    return run_clients(models, options.clients, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
