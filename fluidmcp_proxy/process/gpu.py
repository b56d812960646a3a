"""The memory that a server takes of the GPUs: waiting until it is given back, so that the next one finds it free.

A driver frees a process's memory a moment after the process is gone. What is in use says NVML, through the package
nvidia-ml-py where that is installed (extra ``gpu``); without it nothing is waited for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping

import anyio
import anyio.to_thread

__all__ = ["GpuMemory", "Reader", "find_reader"]

logger = logging.getLogger("fluidmcp_proxy.models")

Reader = Callable[[], Mapping[str, int]]
"""Bytes in use by the UUID of each GPU, in the order of their numbers. May raise anything, and may take long."""

_PATIENCE = 10.0
"""Seconds; a killed server's 40 GiB were back after 0.3 (docs/reliability.md)."""

_PAUSE = 0.05
_GIB = 1024**3
_SLACK = _GIB // 2
_ASLEEP = 4 * _GIB
# A sleeping vLLM keeps its CUDA context and graphs: 1.9 GiB of a 7B model.


class GpuMemory:
    """What one server takes of the GPUs that it sees.

    ``visible`` is its ``CUDA_VISIBLE_DEVICES``, numbers or the beginnings of UUIDs; None: all there are. Others that
    take memory of the same GPUs meanwhile make waiting vain, hence ``patience`` seconds.
    """

    def __init__(self, read: Reader, visible: str | None = None, *, patience: float = _PATIENCE) -> None:
        self._read = read
        self._visible = visible
        self._patience = patience
        self._before: dict[str, int] = {}

    async def note(self) -> None:
        """Remember what is in use now, before the server takes its part."""
        self._before = {}
        with anyio.move_on_after(self._patience):
            self._before = await self._in_use()

    async def until_back(self, *, asleep: bool = False) -> bool:
        """Wait until no more than before is in use, or what a sleeping server keeps; False when patience is over."""
        allowance = _ASLEEP if asleep else _SLACK
        used: dict[str, int] = {}
        with anyio.move_on_after(self._patience):
            while True:
                used = await self._in_use()
                if all(used.get(gpu, 0) <= before + allowance for gpu, before in self._before.items()):
                    return True
                await anyio.sleep(_PAUSE)
        excess = sum(max(0, used.get(gpu, 0) - before) for gpu, before in self._before.items())
        logger.warning("%.1f GiB of GPU memory are not back after %g s", excess / _GIB, self._patience)
        return False

    async def _in_use(self) -> dict[str, int]:
        """Of the visible GPUs; nothing when NVML cannot say."""
        try:
            used = await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True)
        except Exception as fault:  # NVML's own class, which is there with its package only
            logger.warning("the GPUs' memory cannot be read: %s", fault)
            return {}
        return {gpu: used[gpu] for gpu in _visible(list(used), self._visible)}


def _visible(gpus: list[str], visible: str | None) -> list[str]:
    if visible is None:
        return gpus
    names = [name.strip() for name in visible.split(",")]
    return [gpu for number, gpu in enumerate(gpus) if any(_names(name, number, gpu) for name in names)]


def _names(name: str, number: int, gpu: str) -> bool:
    return name == str(number) or (name.startswith("GPU-") and gpu.startswith(name))


def find_reader() -> Reader | None:
    """NVML's, or None without the package, without a driver or without a GPU."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        gpus = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    except Exception as fault:  # as above
        logger.debug("no NVML: %s", fault)
        return None

    def read() -> dict[str, int]:
        return {gpu: nvml.nvmlDeviceGetMemoryInfo(handle).used for gpu, handle in gpus.items()}

    return read if gpus else None
