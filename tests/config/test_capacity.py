"""Whether models fit on their GPUs together."""

from __future__ import annotations

from typing import Any

import pytest

from fluidmcp_proxy.config.capacity import overcommitted
from fluidmcp_proxy.config.load import parse_config


def vllm(*args: str, **keys: Any) -> dict[str, Any]:
    return {"command": "vllm", "args": ["serve", "m", *args], **keys}


def share(number: float) -> list[str]:
    return ["--gpu-memory-utilization", str(number)]


def on(devices: str) -> dict[str, Any]:
    return {"env": {"CUDA_VISIBLE_DEVICES": devices}}


def lines(*entries: dict[str, Any], **environ: str) -> list[str]:
    models = {f"m{number}": entry for number, entry in enumerate(entries)}
    return list(overcommitted(parse_config({"llmModels": models}, environ=environ).models.values(), environ))


@pytest.mark.parametrize(
    "entries",
    [
        [vllm()],
        [vllm(*share(0.5)), vllm(*share(0.5))],
        [vllm(*share(0.1)) for _ in range(10)],
        [vllm(**on("0")), vllm(**on("1"))],
        [vllm(**on("")), vllm(**on(""))],
        [vllm(group="g"), vllm(group="g"), vllm()],
        [vllm(), vllm(start="on_demand")],
        [vllm(), {"command": "llama-server", "args": ["--port", "1"]}],
        [vllm(), {"endpoints": {"base_url": "http://x:1/v1"}}],
        [vllm(), vllm("--config", "f.yaml", "--port", "1")],
        [vllm(), vllm("--device", "cpu")],
        [vllm(), vllm(env={"VLLM_CPU_KVCACHE_SPACE": "1"})],
        [vllm(replicas=2, gpus=[0, 1])],
    ],
)
def test_these_fit(entries: list[dict[str, Any]]) -> None:
    assert lines(*entries) == []


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([vllm(), vllm(*share(0.2))], ["GPU 0: m0 0.9, m1 0.2: together 1.1"]),
        ([vllm(**on("1")), vllm(**on("1,2"))], ["GPU 1: m0 0.9, m1 0.9: together 1.8"]),
        (
            [vllm("--tensor-parallel-size", "2"), vllm("--tensor-parallel-size=2", *share(0.3))],
            ["GPU 0: m0 0.9, m1 0.3: together 1.2", "GPU 1: m0 0.9, m1 0.3: together 1.2"],
        ),
        ([vllm("--tensor-parallel-size", "2", **on("3,4")), vllm(**on("4"))], ["GPU 4: m0 0.9, m1 0.9: together 1.8"]),
        ([vllm(replicas=2)], ["GPU 0: m0.0 0.9, m0.1 0.9: together 1.8"]),
        ([vllm("--gpu-memory-utilization", "lots"), vllm()], ["GPU 0: m0 0.9, m1 0.9: together 1.8"]),
    ],
)
def test_these_do_not(entries: list[dict[str, Any]], said: list[str]) -> None:
    assert [line.partition(" of its memory")[0] for line in lines(*entries)] == said


def test_devices_of_the_gateways_own_environment() -> None:
    assert lines(vllm(), vllm(), CUDA_VISIBLE_DEVICES="7")[0].startswith("GPU 7: ")
