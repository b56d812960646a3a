"""Can vLLM's CPU build be installed and run on this machine? Looks only; downloads, writes and starts nothing."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

PYTHONS = ((3, 11), (3, 14))
"""Oldest and newest Python that vLLM's CPU build has a wheel for."""
CPU_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
GIB = 1024**3
MEMORY = 4 * GIB
"""Available memory for the three processes of vLLM with 1 GiB of KV cache: 3.2 GB measured."""


def obstacles(cache: Path, *, disk: int) -> list[str]:
    """Why not, one sentence each; empty if it can. ``disk``: bytes that the folder ``cache`` will need."""
    found = []
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return [f"vLLM's CPU build is for Linux on x86-64; this is {platform.system()} on {platform.machine()}"]
    if missing := [flag for flag in CPU_FLAGS if flag not in _cpu_flags()]:
        found.append(f"vLLM's CPU build needs AVX-512; this processor lacks {', '.join(missing)}")
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 28):
        found.append(f"vLLM's CPU build needs glibc 2.28 or newer; this is {name or 'another libc'} {version}".rstrip())
    if not interpreters():
        found.append("vLLM's CPU build needs Python 3.11 to 3.14 with the modules venv and ensurepip")
    if (memory := available_memory()) < MEMORY:
        found.append(f"vLLM needs {MEMORY / GIB:.0f} GiB of memory here; {memory / GIB:.1f} GiB are available")
    if (free := shutil.disk_usage(_nearest_folder(cache)).free) < disk:
        found.append(f"{cache} needs {disk / GIB:.1f} GiB of disk; {free / GIB:.1f} GiB are free (another --cache?)")
    return found


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def available_memory() -> int:
    """Bytes that can be had without swapping, the container's limit included."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:  # cgroup v2; page cache counts as used there but can be reclaimed
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return min(available, limit - used + int(statistics.get("file", 0)))
    except (OSError, ValueError):
        return available


def interpreters() -> list[str]:
    """Pythons that vLLM's wheels fit, this one first: PyTorch's wheel may be at hand for one of them only."""
    names = [f"python3.{minor}" for minor in range(PYTHONS[0][1], PYTHONS[1][1] + 1)]
    found: dict[tuple[int, ...], str] = {}
    for candidate in (sys.executable, *filter(None, map(shutil.which, names))):
        probe = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
        answer = subprocess.run([candidate, "-c", probe], capture_output=True, text=True, check=False).stdout.split()
        if answer and PYTHONS[0] <= (version := tuple(map(int, answer))) <= PYTHONS[1]:
            found.setdefault(version, candidate)
    return list(found.values())


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
