"""What is left when something is killed: every fault many times, counted from outside, as a table for
`docs/reliability.md`.

`python benchmarks/faults.py` runs all of them with the stub server, `--fault NAME` some, `--trials N` fewer; `--vllm
COMMAND MODEL` runs the faults of a real vLLM instead. A process belongs to a trial if the trial's marker is in its
environment: the gateway has no say in it. Exit code 1 if a single trial left something or went wrong otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

STUB = Path(__file__).parent.parent / "examples" / "stub_server.py"
DEADLINE = 60.0
STOP_TIMEOUT = 1.0
DRAIN_TIMEOUT = 1.0


class Wrong(Exception):
    """A trial did not go as promised."""


@dataclass
class Trial:
    """A gateway with one model, in a folder and with a marker of its own."""

    folder: Path
    arguments: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    loading: float = 20.0

    def __post_init__(self) -> None:
        self.marker = f"fault-{uuid.uuid4().hex}"
        self.port, self.model_port = free_port(), free_port()
        self.gateways: list[subprocess.Popen[bytes]] = []
        command, *first = self.command or (sys.executable, "-S", "-E", str(STUB), "serve", "m")
        entry = {
            "command": command,
            "args": [*first, "--port", str(self.model_port), *self.arguments],
            "stop_timeout": STOP_TIMEOUT,
            "restart_delay": 0.1,
            **self.model,
        }
        settings = {"log_dir": "log", "runtime_dir": "run", "drain_timeout": DRAIN_TIMEOUT}
        self.config = self.folder / "models.json"
        self.config.write_text(json.dumps({"llmModels": {"m": entry}, "gateway": settings}))

    def start(self) -> subprocess.Popen[bytes]:
        """Start a gateway. PATH carries the marker to it and to everything below it."""
        environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/{self.marker}"}
        command = [sys.executable, "-m", "fluidmcp_proxy", "run", str(self.config), "--port", str(self.port)]
        with open(self.folder / "gateway.log", "ab") as log:
            gateway = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.gateways.append(gateway)
        return gateway

    def status(self) -> dict[str, Any]:
        """The model's state; empty while the gateway does not answer."""
        try:
            answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/models/m", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return answer

    def until(self, state: str, *, spawns: int = 1, within: float | None = None) -> dict[str, Any]:
        """Wait for a state after at least so many launches."""
        end = time.monotonic() + (within or self.loading)
        while True:
            status = self.status()
            if status.get("state") == state and status["spawns"] >= spawns:
                return status
            if time.monotonic() > end:
                raise Wrong(f"not {state} in time but {status}")
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """The living processes of this trial but the gateways, guardians included."""
        own = {gateway.pid for gateway in self.gateways}
        return [pid for pid in marked(self.marker) if pid not in own]

    def guardian(self) -> int:
        """The pid of the guardian."""
        for pid in self.processes():
            if b"guardian.py" in read(f"/proc/{pid}/cmdline"):
                return pid
        raise Wrong("no guardian")

    def heads(self) -> int:
        """How many trees are alive: servers whose parent is a guardian or gone, hence one a tree."""
        return len(
            {group for pid in self.processes() if (group := stat(pid, 2)) == str(pid) and not self._is_guardian(pid)}
        )

    def _is_guardian(self, pid: int) -> bool:
        return b"guardian.py" in read(f"/proc/{pid}/cmdline")

    def clean(self, within: float) -> tuple[int, float]:
        """How many processes are left after ``within`` seconds, and after how many seconds there were none."""
        began = time.monotonic()
        while left := self.processes():
            if time.monotonic() - began > within:
                return len(left), within
            time.sleep(0.01)
        return 0, time.monotonic() - began

    def end(self) -> None:
        """Whatever happened, nothing of this trial stays."""
        for gateway in self.gateways:
            gateway.kill()
            gateway.wait()
        for _ in range(500):
            for pid in marked(self.marker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not marked(self.marker):
                return
            time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def stat(pid: int, index: int) -> str:
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return fields[index].decode() if fields else ""


def marked(marker: str) -> list[int]:
    """Every living process with the marker in its environment; the youngest first, since a storm's live for 3 ms."""
    wanted = marker.encode()
    pids = sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True)
    return [pid for pid in pids if wanted in read(f"/proc/{pid}/environ") and stat(pid, 0) not in ("Z", "X", "")]


@contextlib.contextmanager
def trial(*arguments: str, **keys: Any) -> Iterator[Trial]:
    with tempfile.TemporaryDirectory() as folder:
        running = Trial(Path(folder), arguments, keys)
        try:
            yield running
        finally:
            running.end()


class Streams:
    """Open streams, each read by a thread of its own; ``silent`` counts those that looked finished and were not."""

    def __init__(self, port: int, count: int) -> None:
        self.silent = 0
        self.errors = 0
        self._begun = threading.Semaphore(0)
        body = {"model": "m", "messages": [], "stream": True, "max_tokens": 100_000, "stub": {"token-interval": 0.05}}
        self._threads = [threading.Thread(target=self._read, args=(port, body), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            if not self._begun.acquire(timeout=DEADLINE):
                raise Wrong("a stream did not begin")

    def _read(self, port: int, body: dict[str, Any]) -> None:
        received = b""
        try:
            with httpx.stream(
                "POST", f"http://127.0.0.1:{port}/m/v1/chat/completions", json=body, timeout=None
            ) as answer:
                for chunk in answer.iter_raw():
                    if not received:
                        self._begun.release()
                    received += chunk
            self.silent += b'"error"' not in received
        except httpx.TransportError:
            self.errors += 1

    def join(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE)
            if thread.is_alive():
                raise Wrong("a stream hangs")
        if self.silent:
            raise Wrong(f"{self.silent} silent truncations")


Outcome = tuple[int, float]
"""Processes left, seconds until clean."""


def gateway_killed_at_a_random_moment() -> Outcome:
    with trial("--children", "2", "--load-time", "0.3") as run:
        gateway = run.start()
        time.sleep(random.uniform(0, 1.5))
        gateway.kill()
        gateway.wait()
        return run.clean(STOP_TIMEOUT + 2)


def gateway_ended(*signals: signal.Signals, within: float) -> Callable[[], Outcome]:
    def fault() -> Outcome:
        with trial("--children", "2") as run:
            gateway = run.start()
            run.until("ready")
            streams = Streams(run.port, 1)
            for number in signals:
                gateway.send_signal(number)
                time.sleep(0.2)
            left = run.clean(within)
            gateway.wait(DEADLINE)
            streams.join()
            return left

    return fault


def killed_and_started_again() -> Outcome:
    with trial("--ignore-sigterm") as run:
        gateway = run.start()
        run.until("ready")
        gateway.kill()
        gateway.wait()
        second = run.start()
        end = time.monotonic() + run.loading
        while run.status().get("state") != "ready":
            if run.heads() > 1:
                raise Wrong("two trees")
            if second.poll() is not None or time.monotonic() > end:
                raise Wrong(f"the second gateway did not get ready: {run.status()}")
        if run.status()["spawns"] != 1:
            raise Wrong("it took more than one launch")
        second.terminate()
        return run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)


def stubborn_tree(*arguments: str) -> Callable[[], Outcome]:
    def fault() -> Outcome:
        with trial(*arguments) as run:
            gateway = run.start()
            run.until("ready")
            gateway.kill()
            gateway.wait()
            return run.clean(STOP_TIMEOUT + 2)

    return fault


def head_killed_with_streams() -> Outcome:
    with trial("--children", "2") as run:
        gateway = run.start()
        pid = run.until("ready")["pid"]
        streams = Streams(run.port, 50)
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 20
        while not ((status := run.status()).get("state") == "ready" and status["spawns"] == 2):
            if run.heads() > 1:
                raise Wrong("two trees")
            if time.monotonic() > end:
                raise Wrong(f"not ready again: {status}")
        streams.join()
        gateway.terminate()
        return run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)


def guardian_killed() -> Outcome:
    with trial("--children", "2", "--grandchild") as run:
        gateway = run.start()
        run.until("ready")
        before = set(run.processes())
        began = time.monotonic()
        os.kill(run.guardian(), signal.SIGKILL)
        while before & set(run.processes()):
            if time.monotonic() - began > 3:
                raise Wrong("the old tree is still there")
        seconds = time.monotonic() - began
        run.until("ready", spawns=2)
        gateway.terminate()
        left, _ = run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)
        return left, seconds


def many_restarts() -> Outcome:
    with trial(restart_policy="always", restart_delay=0) as run:
        gateway = run.start()
        pid = run.until("ready")["pid"]
        for count in range(1, 201):
            os.kill(pid, signal.SIGKILL)
            pid = run.until("ready", spawns=count + 1)["pid"]
            if count == 20:
                before = footprint(gateway.pid)
        after = footprint(gateway.pid)
        if after[0] > before[0] + 2 or after[1] > before[1] * 1.1 + 2_000_000 or after[2]:
            raise Wrong(f"descriptors, memory, zombies: {before} before, {after} after")
        gateway.terminate()
        return run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)


def footprint(pid: int) -> tuple[int, int, int]:
    """Open descriptors, resident bytes, zombie children."""
    resident = int(read(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = (int(name) for name in os.listdir("/proc") if name.isdigit() and stat(int(name), 1) == str(pid))
    return len(os.listdir(f"/proc/{pid}/fd")), resident, sum(stat(child, 0) == "Z" for child in children)


def hopeless(spawns: int, *arguments: str, **keys: Any) -> Callable[[], Outcome]:
    """A model that never serves: as many launches as the policy allows, then ``failed``, and an idle gateway."""

    def fault() -> Outcome:
        with trial(*arguments, **keys) as run:
            gateway = run.start()
            status = run.until("failed", spawns=spawns, within=DEADLINE)
            if status["spawns"] != spawns:
                raise Wrong(f"{status['spawns']} launches instead of {spawns}")
            before, began = cpu(gateway.pid), time.monotonic()
            time.sleep(2)
            if (used := (cpu(gateway.pid) - before) / (time.monotonic() - began)) > 0.05:
                raise Wrong(f"{used:.0%} of a core with nothing to do")
            gateway.terminate()
            return run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)

    return fault


def cpu(pid: int) -> float:
    return (int(stat(pid, 11)) + int(stat(pid, 12))) / os.sysconf("SC_CLK_TCK")


class Stranger:
    """A server that takes connections and counts what it is sent."""

    def __init__(self, port: int) -> None:
        self.bytes = 0
        self._socket = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.bytes += len(connection.recv(65536))

    def close(self) -> None:
        self._socket.close()
        if self.bytes:
            raise Wrong(f"the stranger was sent {self.bytes} bytes")


def stranger_before_the_start() -> Outcome:
    with trial() as run:
        stranger = Stranger(run.model_port)
        gateway = run.start()
        if run.until("failed", spawns=0)["reason"] != "port_in_use":
            raise Wrong(f"not port_in_use: {run.status()}")
        httpx.get(f"http://127.0.0.1:{run.port}/m/v1/models")
        stranger.close()
        gateway.terminate()
        return run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)


def stranger_between_crash_and_restart() -> Outcome:
    with trial(restart_delay=0.5) as run:
        gateway = run.start()
        pid = run.until("ready")["pid"]
        os.kill(pid, signal.SIGKILL)
        while True:
            with contextlib.suppress(OSError):
                stranger = Stranger(run.model_port)
                break
        if run.until("failed")["reason"] != "port_in_use":
            raise Wrong(f"not port_in_use: {run.status()}")
        httpx.get(f"http://127.0.0.1:{run.port}/m/v1/models")
        stranger.close()
        gateway.terminate()
        return run.clean(DRAIN_TIMEOUT + STOP_TIMEOUT + 2)


ENDED = DRAIN_TIMEOUT + STOP_TIMEOUT + 2
FAULTS: dict[str, tuple[int, Callable[[], Outcome]]] = {
    "SIGKILL of the gateway in its first 1.5 s": (100, gateway_killed_at_a_random_moment),
    "SIGKILL of the gateway, stream open": (20, gateway_ended(signal.SIGKILL, within=STOP_TIMEOUT + 2)),
    "SIGSEGV of the gateway, stream open": (20, gateway_ended(signal.SIGSEGV, within=STOP_TIMEOUT + 2)),
    "Ctrl-C twice, stream open": (20, gateway_ended(signal.SIGINT, signal.SIGINT, within=STOP_TIMEOUT + 2)),
    "SIGTERM, stream open": (20, gateway_ended(signal.SIGTERM, within=ENDED)),
    "SIGKILL of the gateway, started again at once": (20, killed_and_started_again),
    "server ignores SIGTERM": (20, stubborn_tree("--ignore-sigterm", "--children", "2")),
    "grandchild in its own session": (20, stubborn_tree("--grandchild", "--ignore-sigterm")),
    "double fork": (20, stubborn_tree("--double-fork", "--ignore-sigterm")),
    "child stopped by SIGSTOP": (20, stubborn_tree("--stopped-child", "--ignore-sigterm")),
    "children that fork while they are killed": (20, stubborn_tree("--fork-storm", "--ignore-sigterm")),
    "SIGKILL of the server, 50 streams open": (20, head_killed_with_streams),
    "SIGKILL of the guardian": (20, guardian_killed),
    "200 restarts in a row": (1, many_restarts),
    "command not found": (5, hopeless(0, command="/nowhere/vllm")),
    "server exits at once": (5, hopeless(4, "--crash", "no")),
    "server never ready": (5, hopeless(2, "--never-ready", startup_timeout=1, max_restarts=1)),
    "server crashes 2 s after ready": (5, hopeless(3, "--crash-after-ready", "2", max_restarts=2)),
    "stranger on the port before the start": (20, stranger_before_the_start),
    "stranger on the port between crash and restart": (20, stranger_between_crash_and_restart),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", help="a part of a fault's name; may be repeated")
    parser.add_argument("--trials", type=int, help="at most so many of each")
    options = parser.parse_args()
    wrong = 0
    print("| fault | trials | processes left | wrong | seconds until clean: median, worst |\n|---|--:|--:|--:|--:|")
    for name, (trials, fault) in FAULTS.items():
        if options.fault and not any(part in name for part in options.fault):
            continue
        left, failures, seconds = 0, [], []
        count = min(trials, options.trials or trials)
        for _ in range(count):
            try:
                remaining, took = fault()
                left += remaining
                seconds.append(took)
            except (Wrong, subprocess.TimeoutExpired) as error:
                failures.append(str(error))
        wrong += left + len(failures)
        times = f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "-"
        print(f"| {name} | {count} | {left} | {len(failures)} | {times} |", flush=True)
        for failure in failures[:3]:
            print(f"  {name}: {failure}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
