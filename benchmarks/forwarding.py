"""What forwarding costs: this gateway and its peers before the same upstream, in turn, as a table for
`docs/performance.md`.

`python benchmarks/forwarding.py` measures three rounds and writes the table, `--quick` one short round and only prints;
`--profile` prints where the gateway's time goes under load instead. It needs Linux, two cores, a C compiler and
`wrk`. The proxy has the last core to itself, upstream and load share the first. CPU is utime + stime of the proxy's
process tree; the upstream counts the requests and the events, so that nobody's answer is taken for more than it was.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import pstats
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PEERS = HERE.parent / ".cache" / "peers"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
CONNECTIONS, PACED_STREAMS, IDLE_STREAMS = 32, 256, 1000
EVENTS, FOREVER, TICK_US, HOUR_US = 128, 1_000_000, 20_000, 3_600_000_000
TICKS = os.sysconf("SC_CLK_TCK")
QUESTION = "What is the capital of France? Answer with one sentence."
COLUMNS = {
    "requests/s": ",.0f",
    "CPU µs/request": ".0f",
    "CPU µs/event, burst": ".2f",
    "CPU µs/event, paced": ".1f",
    "p50 added, µs": ".0f",
    "KiB/idle stream": ".1f",
}
CPU = [name for name in COLUMNS if name.startswith("CPU")]
# uvicorn takes asyncio's own loop where uvloop cannot be imported.
WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from fluidmcp_proxy.cli import main; main()"
# The command ends by raising the signal that ended it, which would lose the profile.
PROFILED = """import cProfile, signal, sys; from fluidmcp_proxy.cli import main
profile = cProfile.Profile(); signal.raise_signal = lambda number: None
try: profile.runcall(main)
except SystemExit: pass
finally: profile.dump_stats({!r})"""
CHAT = "/v1/chat/completions"
Measured = dict[str, float]


class DidNotStart(Exception):
    """A proxy does not listen."""


@dataclass(frozen=True)
class Proxy:
    name: str
    command: Callable[[int, int, Path], list[str]] | None
    """From its port, the upstream's port and a folder; none for the upstream itself."""
    path: str = CHAT
    missing: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short windows, printed only")
    parser.add_argument("--profile", action="store_true", help="print where the gateway's time goes instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window of measurement")
    parser.add_argument("--no-install", action="store_true", help="do not install peers from PyPI")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or not shutil.which("cc") or not shutil.which("wrk"):
        sys.exit("needs two cores, a C compiler (cc) and wrk")
    if options.quick:
        options.rounds, options.seconds = 1, min(options.seconds, 1.0)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), cores[0], cores[-1], options.seconds)
        with bench.upstream():
            if options.profile:
                bench.profile()
            else:
                measure_all(bench, options)


def measure_all(bench: Bench, options: argparse.Namespace) -> None:
    problem = "not installed" if options.no_install else install_peers()
    proxies = everyone(problem)
    results: dict[str, list[Measured]] = {proxy.name: [] for proxy in proxies}
    for done in range(1, options.rounds + 1):
        for proxy in proxies:
            if proxy.missing:
                continue
            try:
                results[proxy.name].append(bench.measure(proxy))
                print(done, proxy.name, results[proxy.name][-1], flush=True)
            except (DidNotStart, OSError) as error:
                print(error, file=sys.stderr)
        text = table(proxies, results, done, options.seconds)
        if not options.quick:  # after each round: an interrupted run leaves what it has
            before, _, rest = PAGE.read_text().partition(BEGIN)
            PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    print(text)


# Who is measured


def everyone(problem: str) -> list[Proxy]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        problem_uvloop, uvloop = "uvloop is not installed", ""
        problem_uvloop, uvloop = "", " " + importlib.metadata.version("uvloop")
    path, router = "/m" + CHAT, PEERS / "bin" / "vllm-router"
    return [
        Proxy("direct", None),
        Proxy(f"fluidmcp run, uvloop{uvloop}", gateway(["-m", "fluidmcp_proxy"]), path, problem_uvloop),
        Proxy("fluidmcp run, asyncio", gateway(["-c", WITHOUT_UVLOOP]), path),
        Proxy("nginx" + nginx_version(), nginx, missing="" if shutil.which("nginx") else "not installed"),
        Proxy("vllm-router" + peer_version("vllm-router"), vllm_router, missing="" if router.exists() else problem),
    ]


def install_peers() -> str:
    """Their own environment; what went wrong, in a word."""
    if not (PEERS / "bin" / "pip").exists():
        venv.create(PEERS, with_pip=True)
    pip = [PEERS / "bin" / "pip", "install", "-q", "--prefer-binary"]
    subprocess.run([*pip, "vllm-router"], check=False, timeout=600)
    return "could not be installed"


def nginx_version() -> str:
    if not shutil.which("nginx"):
        return ""
    told = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    return " " + told.split("/")[-1].split()[0]


def peer_version(package: str) -> str:
    found = [*importlib.metadata.distributions(name=package, path=[str(p) for p in PEERS.glob("lib/*/site-packages")])]
    return " " + found[0].version if found else ""


def gateway(arguments: list[str]) -> Callable[[int, int, Path], list[str]]:
    def command(port: int, upstream: int, folder: Path) -> list[str]:
        models = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}}
        (folder / "models.json").write_text(json.dumps({"llmModels": models}))
        return [sys.executable, *arguments, "run", str(folder / "models.json"), "--port", str(port)]

    return command


def nginx(port: int, upstream: int, folder: Path) -> list[str]:
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 8192; }}
http {{ {temporary} access_log off; keepalive_requests 1000000000;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port};
    location / {{ proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering
    off; }} }} }}
""")
    return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def vllm_router(port: int, upstream: int, folder: Path) -> list[str]:
    there = ["--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--log-level", "warning"]
    here = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    return [str(PEERS / "bin" / "vllm-router"), *here, *there]


# How it is measured


@dataclass
class Bench:
    folder: Path
    load_core: int
    proxy_core: int
    seconds: float
    port: int = 0
    direct_p50: float = 0.0

    @contextlib.contextmanager
    def upstream(self) -> Iterator[None]:
        program = str(self.folder / "upstream")
        subprocess.run(["cc", "-O2", "-o", program, str(HERE / "upstream.c")], check=True)
        self.port = free_port()
        with self.running([program, str(self.port)], self.load_core, self.port):
            yield

    @contextlib.contextmanager
    def running(self, command: list[str], core: int, port: int) -> Iterator[int]:
        # Twice as many sockets as idle streams are open in the proxy.
        command = ["prlimit", "--nofile=8192", "taskset", "-c", str(core), *command]
        with (self.folder / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
            try:
                wait_for(port, process, self.folder / "log")
                yield process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
                process.wait()

    def measure(self, proxy: Proxy) -> Measured:
        if proxy.command is None:
            return self.windows(self.port, proxy.path, None)
        port = free_port()
        with self.running(proxy.command(port, self.port, self.folder), self.proxy_core, port) as pid:
            return self.windows(port, proxy.path, pid)

    def windows(self, port: int, path: str, pid: int | None) -> Measured:
        url, got = f"http://127.0.0.1:{port}{path}", {}
        requests, _, cpu, seconds = self.window(url, CONNECTIONS, pid, stream=False)
        got["requests/s"], got["CPU µs/request"] = requests / seconds, cpu / max(requests, 1)
        _, events, cpu, _ = self.window(url, CONNECTIONS, pid, max_tokens=EVENTS)
        got["CPU µs/event, burst"] = cpu / max(events, 1)
        _, events, cpu, seconds = self.window(url, PACED_STREAMS, pid, max_tokens=FOREVER, tick_us=TICK_US)
        got["CPU µs/event, paced"] = cpu / max(events, 1)
        got["paced"] = events / seconds / (PACED_STREAMS * 1e6 / TICK_US)
        p50 = latency(self.load(url, 1, self.seconds, stream=False).communicate()[0])
        if pid is None:
            self.direct_p50 = p50
            return {"requests/s": got["requests/s"], "p50 added, µs": 0.0, "p50": p50}
        got["p50 added, µs"] = p50 - self.direct_p50
        got["KiB/idle stream"] = memory_of_streams(port, path, pid)
        return got

    def window(self, url: str, connections: int, pid: int | None, **body: object) -> tuple[int, int, float, float]:
        """What the upstream answered while it was running evenly: requests, events, CPU in µs, seconds."""
        load = self.load(url, connections, self.seconds + 2, **body)
        time.sleep(1)
        start, before, cpu = time.monotonic(), self.stats(), cpu_of(pid)
        time.sleep(self.seconds)
        seconds, after, cpu = time.monotonic() - start, self.stats(), cpu_of(pid) - cpu
        if re.search("Non-2xx|Socket errors", errors := load.communicate()[0]) and body.get("max_tokens") != FOREVER:
            print("!", errors, file=sys.stderr)
        return after["requests"] - before["requests"], after["events"] - before["events"], cpu, seconds

    def load(self, url: str, connections: int, seconds: float, **body: object) -> subprocess.Popen[str]:
        script = self.folder / "load.lua"
        text = chat(**{"stream": True, **body})
        script.write_text(f"wrk.method='POST' wrk.headers['Content-Type']='application/json' wrk.body=[[{text}]]")
        pinned = ["taskset", "-c", str(self.load_core), "wrk", "-t1", "--latency"]
        command = [*pinned, f"-c{connections}", f"-d{seconds:.0f}", "-s", str(script), url]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stats(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=10) as answer:
            return json.load(answer)

    def profile(self) -> None:
        port, stats = free_port(), str(self.folder / "profile")
        command = gateway(["-c", PROFILED.format(stats)])(port, self.port, self.folder)
        url = f"http://127.0.0.1:{port}/m{CHAT}"
        with self.running(command, self.proxy_core, port):
            self.load(url, CONNECTIONS, self.seconds, stream=False).communicate()
            self.load(url, CONNECTIONS, self.seconds, max_tokens=EVENTS).communicate()
        pstats.Stats(stats).sort_stats("tottime").print_stats(40)


def chat(**options: object) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], **options}
    return json.dumps(body, separators=(",", ":"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            time.sleep(0.5)  # a router looks at its workers first
            return
        time.sleep(0.05)
    raise DidNotStart(f"{process.args} does not listen:\n{log.read_text()[-2000:]}")


def tree(pid: int) -> list[int]:
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_of(pid: int | None) -> float:
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in tree(pid)] if pid else []
    return sum(int(stat[11]) + int(stat[12]) for stat in fields) / TICKS * 1e6


def memory(pid: int) -> float:
    texts = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in tree(pid)]
    return float(sum(int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) for text in texts))  # type: ignore[index]


def memory_of_streams(port: int, path: str, pid: int) -> float:
    """KiB (PSS) for each stream that is open, has had an event and waits for the next."""
    body = chat(stream=True, max_tokens=FOREVER, tick_us=HOUR_US)
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    time.sleep(1)
    before = memory(pid)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE_STREAMS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            client.sendall((head + body).encode())
            got = b""
            while b"data:" not in got:
                if not (block := client.recv(65536)):
                    return float("nan")
                got += block
        return (memory(pid) - before) / IDLE_STREAMS


def latency(output: str) -> float:
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", output).groups()  # type: ignore[union-attr]
    return float(value) * {"us": 1, "ms": 1e3, "s": 1e6}[unit]


# What is written


def table(proxies: list[Proxy], results: dict[str, list[Measured]], rounds: int, seconds: float) -> str:
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in results.items()
        if runs
    }
    rows = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'--:|' * len(COLUMNS)}"]
    for proxy in proxies:
        got = medians.get(proxy.name, {})
        cells = [format(got[key], form) if key in got else "–" for key, form in COLUMNS.items()]
        rows.append(
            f"| {proxy.name} | {' | '.join(cells)} |"
            if got
            else f"| {proxy.name} | not measured: {proxy.missing or 'did not start'} |"
        )
    lines = [f"{describe()}. Medians of {rounds} round(s), windows of {seconds:g} s.", "", *rows, ""]
    ours = [name for name in medians if name.startswith("fluidmcp")]
    others = [name for name in medians if not name.startswith(("fluidmcp", "direct"))]
    lines += [f"| CPU, ratio | {' | '.join(key.removeprefix('CPU µs/') for key in CPU)} |", f"|---|{'--:|' * len(CPU)}"]
    for our, other in ((our, other) for our in ours for other in others):
        ratios = [f"{medians[our][key] / medians[other][key]:.2f}" if medians[other][key] else "–" for key in CPU]
        lines.append(f"| {our} : {other} | {' | '.join(ratios)} |")
    late = [f"{name} ({got['paced']:.0%})" for name, got in medians.items() if got.get("paced", 1) < 0.98]
    lines += [
        "",
        "Did not keep the pace: " + ", ".join(late) + "." if late else "All kept the pace of the paced streams.",
    ]
    return "\n".join([*lines, ""])


def describe() -> str:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}," for name in ("fluidmcp_proxy", "uvicorn", "httptools")
    )
    machine = (
        f"{cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"
    )
    command = "python " + " ".join([os.path.relpath(sys.argv[0], HERE.parent), *sys.argv[1:]])
    machine += f", load average {os.getloadavg()[2]:.1f} over the last 15 minutes"
    return f"{machine}; Python {platform.python_version()}, {versions} {datetime.date.today()}; `{command}`"


if __name__ == "__main__":
    main()
