"""What the lines of a loading server say."""

from __future__ import annotations

import pytest

from fluidmcp_proxy.models.progress import LINES, Progress, Stage, read_progress

ENGINE = "(EngineCore pid=12208) INFO 11-24 09:21:22 "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Fetching 4 files:  25%|██▌       | 1/4 [00:03<00:09,  3.10s/it]", (Stage.DOWNLOADING, 25)),
        ("model-00001-of-00004.safetensors:  35%|███▌      | 1.74G/4.98G [00:21<00:39]", (Stage.DOWNLOADING, 35)),
        (ENGINE + "[weight_utils.py:548] Time spent downloading weights for m: 31.9 seconds", (Stage.LOADING, 100)),
        (ENGINE + "[gpu_model_runner.py:3] Starting to load model facebook/opt-125m...", (Stage.LOADING, None)),
        ("Loading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]", (Stage.LOADING, 0)),
        ("Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:01<00:00, 2it/s]", (Stage.LOADING, 75)),
        (ENGINE + "[default_loader.py:308] Loading weights took 2.34 seconds", (Stage.LOADING, 100)),
        (ENGINE + "[gpu_model_runner.py:5] Model loading took 14.9 GiB and 3.2 seconds", (Stage.LOADING, 100)),
        (ENGINE + "[backends.py:548] Dynamo bytecode transform time: 5.30 s", (Stage.COMPILING, None)),
        (ENGINE + "[backends.py:215] Compiling a graph for dynamic shape takes 20.1 s", (Stage.COMPILING, None)),
        (ENGINE + "[monitor.py:34] torch.compile takes 25.4 s in total", (Stage.COMPILING, 100)),
        (
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  45%|████▍     | 30/67 [00:02<00:02]",
            (Stage.CAPTURING, 45),
        ),
        (ENGINE + "[gpu_model_runner.py:6] Graph capturing finished in 20 secs, took 0.5 GiB", (Stage.CAPTURING, 100)),
        (
            ENGINE + "[core.py:214] init engine (profile, create kv cache, warmup model) took 9.1 s",
            (Stage.WARMING_UP, None),
        ),
        ("load_tensors: loading model tensors, this can take a while...", (Stage.LOADING, None)),
        (ENGINE + "[api_server.py:1839] vLLM API server version 0.33.0", (None, None)),
        (
            ENGINE
            + "[core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m', "
            + 200 * "x=1, "
            + "download_dir=None, level='Capturing graph'",
            (None, None),
        ),
        ("", (None, None)),
    ],
)
def test_a_line(line: str, expected: tuple[Stage | None, int | None]) -> None:
    assert read_progress([line]) == Progress(*expected)


def test_what_says_nothing_does_not_hide_what_was_said() -> None:
    lines = ["Loading safetensors checkpoint shards:  50% Completed | 2/4", "INFO something else, 99% sure"]
    assert read_progress(lines) == (Stage.LOADING, 50)
    assert read_progress([*lines, "Capturing CUDA graphs:   3%|"]) == (Stage.CAPTURING, 3)


def test_only_the_last_lines_count() -> None:
    assert read_progress(["Loading weights took 1 s", *[""] * LINES]) == Progress()
    assert read_progress([]) == Progress()
