"""What the C library does with memory that was freed, for a process that forwards large bodies."""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD = -1  # malloc.h
_KEPT = 64 * 1024 * 1024


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB at the end of its heap; elsewhere nothing is done.

    It gives all but 128 KiB back to the kernel whenever a body has been freed, and takes it again page by page for the
    next one: a body of 20 MB that is held until its model's name is found cost 13 ms more by that (mallopt(3)).
    """
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, _KEPT)
