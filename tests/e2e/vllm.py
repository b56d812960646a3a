"""The gateway as a process with a real vLLM, or another engine, behind it, and what can be seen of both outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.ports import free_port

Launch = Literal["run", "uvicorn", "socket", "transformers"]
"""How the gateway is started; ``socket``: as ``run``, with a vLLM that nobody has given a port; ``transformers``: as
``run``, with ``transformers serve`` in vLLM's place."""
LOADING = 300.0
"""Seconds within which vLLM must be ready."""
CLEARING = 60.0
"""Seconds within which every process must be gone."""


def eventually(condition: Callable[[], Any], what: str, deadline: float) -> Any:
    """Wait until ``condition()`` is true, and return it; an assertion error after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        time.sleep(0.03)
    return result


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(port: int, method: str, path: str, body: object = None, *, timeout: float = 120) -> Answer:
    """One request on a connection of its own; ``body`` is sent as JSON, or as it is when it is bytes."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with its number."""

    pid: int
    born: str

    def is_alive(self) -> bool:
        return _born(self.pid) == self.born

    def parent(self) -> int:
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])

    def title(self) -> str:
        """What ``ps`` shows: vLLM's processes rename themselves."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""


def _born(pid: int) -> str | None:
    """Start time in clock ticks since boot; none for a zombie, which is only waiting to be counted."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@dataclass
class Gateway:
    """One gateway process with one model, ``smol``."""

    process: subprocess.Popen[bytes]
    launch: Launch
    port: int
    vllm_port: int
    marker: str
    log: Path
    seen: set[Process] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/smol"

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = request(self.port, "GET", "/models/smol").json()
        return state

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"the gateway ended:\n{self.tail()}"
        try:
            return request(self.port, "GET", "/ready").status == 200
        except OSError:
            return False

    def wait_until_ready(self) -> None:
        eventually(self.is_ready, f"the model is ready\n{self.tail()}", LOADING)
        self.model_processes()

    def model_processes(self) -> list[Process]:
        """Every process that has the model's marker in its environment, or had it when it was seen before."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.marker.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if marked and int(folder.name) != self.process.pid and (born := _born(int(folder.name))):
                self.seen.add(Process(int(folder.name), born))
        return [process for process in self.seen if process.is_alive()]

    def model_process(self, title: str) -> Process:
        """The one whose title has ``title`` in it."""
        processes = self.model_processes()
        (found,) = [process for process in processes if title in process.title()]
        return found

    def metric(self, name: str) -> float:
        """A metric of vLLM's own; it labels each with engine and model, of which there is one here."""
        text = request(self.vllm_port, "GET", "/metrics").body.decode()
        (value,) = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name + "{")]
        return float(value)

    def running(self) -> float:
        return self.metric("vllm:num_requests_running")

    def generated(self) -> float:
        """Tokens, in vLLM's whole life; it does not count the requests that it aborts for a client that has left."""
        return self.metric("vllm:generation_tokens_total")

    def end(self, signum: signal.Signals) -> int:
        """Send the gateway a signal, wait until it and its model are gone, and return its exit status."""
        self.model_processes()
        self.process.send_signal(signum)
        status = self.process.wait(CLEARING)
        self.wait_until_gone()
        return status

    def wait_until_gone(self) -> None:
        alive = self.model_processes
        eventually(lambda: not alive(), f"gone: {[process.title() for process in alive()]}", CLEARING)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])


class Runner:
    """Keeps at most one gateway running."""

    def __init__(self, prepared: dict[str, Any], folder: Path) -> None:
        self._prepared, self._folder = prepared, folder
        self._gateway: Gateway | None = None
        self._started = 0

    def ready(self, launch: Launch) -> Gateway:
        gateway = self._gateway
        if gateway is None or gateway.launch != launch or gateway.process.poll() is not None:
            gateway = self.start(launch)
        gateway.wait_until_ready()
        return gateway

    def start(self, launch: Launch) -> Gateway:
        """A new gateway, its model loading; the old one is ended first."""
        self.stop()
        self._started += 1
        port, vllm_port, marker = free_port(), free_port(), f"e2e-{uuid.uuid4()}"
        configuration = self._folder / f"models-{self._started}.json"
        if launch == "transformers":
            model = self._transformers(vllm_port)
        else:
            model = self._vllm(None if launch == "socket" else vllm_port)
        model["env"] |= {"E2E_MARKER": marker}
        configuration.write_text(json.dumps({"llmModels": {"smol": model}}))
        log = self._folder / f"gateway-{self._started}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(launch, configuration, port),
                env=os.environ | {"FLUIDMCP_CONFIG": str(configuration), "FLUIDMCP_DRAIN_TIMEOUT": "5"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._gateway = Gateway(process, launch, port, vllm_port, marker, log)
        return self._gateway

    def stop(self) -> None:
        """End the gateway, if one is running; whatever it leaves behind is cleared away and is a failure."""
        gateway, self._gateway = self._gateway, None
        if gateway is None:
            return
        try:
            gateway.end(signal.SIGTERM)
        finally:
            for process in gateway.model_processes():
                os.kill(process.pid, signal.SIGKILL)

    def _vllm(self, port: int | None) -> dict[str, Any]:
        arguments = ["serve", self._prepared["model"]]
        arguments += [] if port is None else ["--port", str(port), "--host", "127.0.0.1"]
        arguments += ["--served-model-name", "smol", "--max-model-len", "1024", "--enforce-eager"]
        return {
            "command": self._prepared["vllm"],
            "args": arguments,
            "env": {**self._prepared["environment"]},
            "stop_timeout": 6,  # a vLLM that is still loading takes no notice of SIGTERM
            "endpoints": {} if port is None else {"base_url": f"http://127.0.0.1:{port}/v1"},
            "max_restarts": 10,  # it is killed several times within the minute that would forget the ones before
        }

    def _transformers(self, port: int) -> dict[str, Any]:
        """As ``docs/engines.md`` has it; its list of models is what lies in the cache folder: here nothing."""
        cache = self._folder / "hub"
        cache.mkdir(exist_ok=True)
        arguments = ["serve", self._prepared["model"], "--device", "cpu"]
        return {
            "command": str(Path(self._prepared["vllm"]).with_name("transformers")),
            "args": [*arguments, "--port", str(port), "--host", "127.0.0.1"],
            # Its threads wait for each other spinning: on a busy machine two of them are ten times slower than one.
            "env": {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        }


def _command(launch: Launch, configuration: Path, port: int) -> list[str]:
    if launch != "uvicorn":
        return [sys.executable, "-m", "fluidmcp_proxy", "run", str(configuration), "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", "fluidmcp_proxy:app", "--port", str(port), "--log-level", "warning"]


def comparable(body: bytes) -> bytes:
    """A body without what is new in every answer: ids and times."""
    body = re.sub(rb'"((?:\w+_)?id)":"[^"]*"', rb'"\1":"ID"', body)
    return re.sub(rb'"(created|created_at|completed_at)":[0-9.]+', rb'"\1":0', body)


def events(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON events of an SSE body."""
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))
