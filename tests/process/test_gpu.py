"""GPU memory: how long it is waited for, with a reader that the test controls."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.process.gpu import GpuMemory, find_reader

pytestmark = pytest.mark.anyio

GIB = 1024**3
A, B = "GPU-aaaa-1", "GPU-bbbb-2"


class Gpus:
    """Used GiB by GPU; counts its readings, and frees what it is told to free at the next one but ``after``."""

    def __init__(self, **used: float) -> None:
        self.used = {A: used.get("a", 0), B: used.get("b", 0)}
        self.reads = 0
        self.freed: dict[str, float] = {}
        self.after = 0

    def __call__(self) -> dict[str, int]:
        self.reads += 1
        if self.freed:
            self.after -= 1
            if self.after <= 0:
                self.used |= self.freed
        return {gpu: int(used * GIB) for gpu, used in self.used.items()}


async def test_it_is_waited_for_until_it_is_back() -> None:
    gpus = Gpus(a=1)
    memory = GpuMemory(gpus, patience=20)
    await memory.note()
    gpus.used[A] = 70
    gpus.freed, gpus.after = {A: 1.2}, 3
    assert await memory.until_back()
    assert gpus.reads == 4


@pytest.mark.parametrize(("left", "asleep", "back"), [(0.4, False, True), (3, False, False), (3, True, True)])
async def test_what_may_stay(left: float, asleep: bool, back: bool) -> None:
    gpus = Gpus(a=10)
    memory = GpuMemory(gpus, patience=20)
    await memory.note()
    memory._patience = 20 if back else 0.05
    gpus.used[A] += left
    assert await memory.until_back(asleep=asleep) is back


@pytest.mark.parametrize("visible", ["0", " 0 ", "GPU-aaaa", "0,7"])
async def test_only_its_own_gpus_count(visible: str) -> None:
    gpus = Gpus()
    memory = GpuMemory(gpus, visible, patience=20)
    await memory.note()
    gpus.used[B] = 80  # somebody else's
    assert await memory.until_back()
    impatient = GpuMemory(gpus, "1", patience=20)
    gpus.used[B] = 0
    await impatient.note()
    impatient._patience = 0.05
    gpus.used[B] = 80
    assert not await impatient.until_back()


async def test_a_reader_that_fails_is_not_waited_for() -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("driver lost")

    memory = GpuMemory(fail, patience=20)
    await memory.note()
    assert await memory.until_back()


async def test_a_reader_that_hangs_costs_no_more_than_the_patience() -> None:
    release = threading.Event()

    def hang() -> dict[str, int]:
        release.wait(20)
        return {A: 0}

    memory = GpuMemory(hang, patience=0.05)
    with anyio.fail_after(10):
        await memory.note()
        assert not await memory.until_back()
    release.set()


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = ModuleType("pynvml")
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetCount = lambda: 2
    fake.nvmlDeviceGetHandleByIndex = lambda number: number
    fake.nvmlDeviceGetUUID = lambda handle: (A, B)[handle]
    fake.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=(handle + 1) * GIB)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    read = find_reader()
    assert read is not None
    assert read() == {A: GIB, B: 2 * GIB}
    fake.nvmlDeviceGetCount = lambda: 0
    assert find_reader() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert find_reader() is None
