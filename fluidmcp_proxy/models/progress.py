"""How far a model's server is with loading, read from what it prints: pure.

The lines are those of vLLM 0.6 to 0.33, of tqdm and of Hugging Face's downloads, which other engines print, too. What
is not recognised says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

__all__ = ["LINES", "Progress", "Stage", "read_progress"]

LINES = 100
"""Lines at the end of the output that are looked at."""


class Stage(StrEnum):
    """What a server does before it is ready, in the usual order."""

    DOWNLOADING = "downloading"
    LOADING = "loading weights"
    COMPILING = "compiling"
    CAPTURING = "capturing graphs"
    WARMING_UP = "warming up"


class Progress(NamedTuple):
    """``percent`` is how much of the stage is done, 0 to 100, where the server says so."""

    stage: Stage | None = None
    percent: int | None = None


# vLLM prints its whole configuration in a line, with words of every stage in it.
_LINE_BYTES = 300
_PERCENT = re.compile(r"(?<![\d.])(\d{1,3})(?:\.\d+)?%")

# The first that fits a line counts.
_SIGNS: tuple[tuple[re.Pattern[str], Stage, bool], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), stage, is_over)
    for pattern, stage, is_over in (
        (r"Graph capturing finished", Stage.CAPTURING, True),
        (r"Capturing (CUDA |cuda)?graph", Stage.CAPTURING, False),
        (r"torch\.compile took|torch\.compile takes|Compilation finished", Stage.COMPILING, True),
        (
            r"Dynamo bytecode transform|Compiling a graph|Start compiling|torch\.compile\b.*\bstart",
            Stage.COMPILING,
            False,
        ),
        (r"init engine .* took|Warming up|Application startup|Starting vLLM API server", Stage.WARMING_UP, False),
        (r"Loading weights took|Model loading took|Time spent downloading weights", Stage.LOADING, True),
        (r"checkpoint shards|Starting to load model|Loading weights\b|Load(ing)? weights? begin", Stage.LOADING, False),
        (r"llama_model_loader|load_tensors", Stage.LOADING, False),
        (r"\bDownloading\b|Fetching \d+ files|\.(safetensors|gguf|bin):\s+\d+%", Stage.DOWNLOADING, False),
    )
)


def read_progress(lines: Sequence[str]) -> Progress:
    """The progress that ``lines``, the last of a server's output, tell of."""
    for line in reversed(lines[-LINES:]):
        for sign, stage, is_over in _SIGNS:
            if sign.search(line, 0, _LINE_BYTES):
                return Progress(stage, 100 if is_over else _percent(line))
    return Progress()


def _percent(line: str) -> int | None:
    found = _PERCENT.search(line)
    return None if found is None else min(100, int(found[1]))
