"""Processes that are pinned to a core each, and what they cost: CPU and memory of their trees, as /proc has them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "benchmarks" / "native"
CHAT = "/v1/chat/completions"
QUESTION = "What is the capital of France? Answer with one sentence."
# Twice as many sockets as idle streams are open in a proxy.
FILES = 8192
TICKS = os.sysconf("SC_CLK_TCK")


class DidNotStart(Exception):
    """A program does not listen; the message has its last words."""


@dataclass(frozen=True)
class Machine:
    """One core for the load and the upstream, one for the proxy, and a folder for what they write."""

    folder: Path
    load_core: int
    proxy_core: int

    @contextlib.contextmanager
    def upstream(self, *, keep_alive: float = 0) -> Iterator[int]:
        """The upstream's port; it closes connections that are idle for ``keep_alive`` seconds, if that is not 0."""
        port = free_port()
        with self.running([self.compiled("upstream"), str(port), str(keep_alive)], self.load_core, port):
            yield port

    @contextlib.contextmanager
    def running(self, command: list[str], core: int | None, port: int, patience: float = 60.0) -> Iterator[int]:
        """The pid of a server that listens, and is ended afterwards; without a core of its own it has both."""
        pinned = ["taskset", "-c", f"{self.load_core},{self.proxy_core}" if core is None else str(core)]
        with tempfile.TemporaryFile("w+", dir=self.folder) as log:
            process = subprocess.Popen(
                ["prlimit", f"--nofile={FILES}", *pinned, *command], stdout=log, stderr=log, cwd=self.folder
            )
            try:
                if not listens(port, process, patience):
                    log.seek(0)
                    raise DidNotStart(f"{' '.join(command)} does not listen:\n{log.read()[-2000:]}")
                yield process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
                process.wait()

    def compiled(self, name: str) -> str:
        """A program of ``native/``, compiled when it is first asked for."""
        program = self.folder / name
        if not program.exists():
            subprocess.run(["cc", "-O2", "-o", program, NATIVE / f"{name}.c"], check=True)
        return str(program)

    def loading(self, *command: str) -> list[str]:
        return ["taskset", "-c", str(self.load_core), *command]


@contextlib.contextmanager
def machine(*tools: str) -> Iterator[Machine]:
    """This machine; ends the program with a word when it lacks something."""
    cores = sorted(os.sched_getaffinity(0))
    if sys.platform != "linux" or len(cores) < 2:
        sys.exit("needs Linux and two cores")
    if lacking := [tool for tool in ("cc", "taskset", "prlimit", *tools) if not shutil.which(tool)]:
        sys.exit(f"needs {', '.join(lacking)} (Debian: apt-get install gcc util-linux wrk nginx)")
    # This program is part of the load.
    os.sched_setaffinity(0, {cores[0]})
    try:
        with tempfile.TemporaryDirectory() as name:
            yield Machine(Path(name), cores[0], cores[-1])
    finally:
        os.sched_setaffinity(0, cores)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int, process: subprocess.Popen[bytes], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            time.sleep(0.5)  # a router looks at its workers first
            return True
        time.sleep(0.05)
    return False


def stats(port: int) -> dict[str, int]:
    """What the upstream has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
        counted: dict[str, int] = json.load(answer)
        return counted


def chat(**options: object) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], **options}
    return json.dumps(body, separators=(",", ":"))


def post(path: str, body: str) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()


# What a tree of processes costs


def tree(pid: int) -> list[int]:
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_of(pid: int) -> float:
    """Microseconds, user and system."""
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in tree(pid)]
    return sum(int(stat[11]) + int(stat[12]) for stat in fields) / TICKS * 1e6


def memory(pid: int) -> float:
    """KiB (PSS)."""
    return sum(_kib(one, "smaps_rollup", "Pss") for one in tree(pid))


def reset_peak(pid: int) -> None:
    for one in tree(pid):
        Path(f"/proc/{one}/clear_refs").write_text("5")


def peak(pid: int) -> float:
    """KiB: the largest resident memory since ``reset_peak``."""
    return sum(_kib(one, "status", "VmHWM") for one in tree(pid))


def _kib(pid: int, file: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    return float(found[1]) if found else 0.0


# What is said of it


def description() -> str:
    """The machine, and the versions of what runs on it."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    versions = [f"{name} {version(name)}" for name in ("fluidmcp_proxy", "uvicorn", "httptools", "uvloop")]
    return (
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, load average "
        f"{os.getloadavg()[2]:.1f} over the last 15 minutes; Python {platform.python_version()}, {', '.join(versions)}"
    )


def version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"
