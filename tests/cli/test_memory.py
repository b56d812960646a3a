"""What is freed is not given back, and not taken again page by page."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from fluidmcp_proxy.cli.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def body():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [b"x" * 65536 for _ in range(300)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

body()
print(body())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_large_body_takes_the_memory_of_the_one_before() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, check=True).stdout)
        for way in ("kept", "given back")
    }
    assert faults["kept"] < faults["given back"] / 4, faults
