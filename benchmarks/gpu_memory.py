"""Is the GPU's memory back? A server whose grandchild, in a session of its own as an engine might be, holds 40 GiB of
it.

`python benchmarks/gpu_memory.py` on a machine with an NVIDIA GPU and PyTorch: each victim is killed three times, and
the time is taken until `nvidia-smi` shows no more than before.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUB = Path(__file__).parent.parent / "examples" / "stub_server.py"
GIB = 40
PORT, MODEL_PORT = 8097, 8096
VICTIMS = [("gateway", "SIGKILL"), ("gateway", "SIGTERM"), ("server", "SIGKILL"), ("guardian", "SIGKILL")]


def serve(arguments: list[str]) -> None:
    """The stub server, once its grandchild holds the memory."""
    flag = Path(os.environ["HELD"])
    if os.fork() == 0:
        os.setsid()
        import torch

        held = torch.empty(GIB << 30, dtype=torch.uint8, device="cuda").fill_(1)
        torch.cuda.synchronize()
        flag.write_text(str(held.numel()))
        while True:
            time.sleep(60)
    while not flag.exists():
        time.sleep(0.05)
    sys.argv = [str(STUB), *arguments]
    runpy.run_path(str(STUB), run_name="__main__")


def used() -> int:
    """MiB of the first GPU that are in use."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def status() -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.load(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/models/m", timeout=2))
    except OSError:
        return {}
    return answer


def until(condition: Callable[[], bool], seconds: float) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"not within {seconds} s")
        time.sleep(0.02)
    return time.monotonic() - began


def trial(victim: str, number: signal.Signals, before: int) -> tuple[int, float]:
    """MiB that were held, and seconds until they were back."""
    with tempfile.TemporaryDirectory() as folder:
        model = {
            "command": sys.executable,
            "args": [__file__, "--serve", "serve", "m", "--port", str(MODEL_PORT)],
            "env": {"HELD": f"{folder}/held"},
            "stop_timeout": 2,
            "restart_policy": "no",
        }
        gateway = {"log_dir": folder, "runtime_dir": folder, "drain_timeout": 1, "log_level": "critical"}
        config = Path(folder, "models.json")
        config.write_text(json.dumps({"llmModels": {"m": model}, "gateway": gateway}))
        command = [sys.executable, "-m", "fluidmcp_proxy", "run", str(config), "--port", str(PORT)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            until(lambda: status().get("state") == "ready", 120)
            held, server = used() - before, int(status()["pid"])
            guardian = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill({"gateway": process.pid, "server": server, "guardian": guardian}[victim], number)
            return held, until(lambda: used() <= before + 64, 30)
        finally:
            process.kill()
            process.wait()


def main() -> None:
    before = used()
    print("| killed | MiB held | seconds until they are back |\n|---|--:|--:|")
    for victim, name in VICTIMS:
        trials = [trial(victim, getattr(signal, name), before) for _ in range(3)]
        times = ", ".join(f"{seconds:.2f}" for _, seconds in trials)
        print(f"| {victim}, {name} | {trials[0][0]} | {times} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    else:
        main()
