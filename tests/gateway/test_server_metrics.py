"""The servers' own metrics: read line by line as prometheus_client reads them, merged, or left out."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway import server_metrics
from fluidmcp_proxy.gateway.server_metrics import Told, merged, read
from tests.gateway.test_metrics import Samples, samples_of, value
from tests.serving import DEADLINE, eventually, serving, stub

WHERE = {"model_id": "m"}
VLLM = "vllm:generation_tokens_total"


def through(*texts: str) -> str:
    """What becomes of the texts of the models ``m0``, ``m1`` …"""
    told = [
        Told({"model_id": f"m{number}"}, read(text, {"model_id": f"m{number}"})) for number, text in enumerate(texts)
    ]
    return merged(told).decode()


NAMES = st.from_regex(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,8}", fullmatch=True).map(lambda name: f"x{name}x")
LABELS = st.dictionaries(
    st.sampled_from(["a", "engine", "le_", "model_id", "exported_b"]), st.text(st.characters(codec="utf-8")), max_size=3
)


@st.composite
def registries(draw: st.DrawFn) -> CollectorRegistry:
    registry = CollectorRegistry()
    for name in draw(st.lists(NAMES, unique_by=str.lower, max_size=4)):
        labels = draw(LABELS)
        kind = draw(st.sampled_from([Counter, Gauge, Histogram, Summary]))
        metric: Any = kind(name, draw(st.text(st.characters(codec="utf-8"))), list(labels), registry=registry)
        child = metric.labels(**labels) if labels else metric
        amount = draw(st.floats(0, 1e300))
        child.inc(amount) if kind in (Counter, Gauge) else child.observe(amount)
    return registry


@hypothesis.given(registries())
def test_it_reads_what_prometheus_client_writes(registry: CollectorRegistry) -> None:
    text = generate_latest(registry).decode()
    before = list(text_string_to_metric_families(text))
    after = {family.name: family for family in text_string_to_metric_families(through(text))}
    for family in before:
        ours = after[family.name]
        assert (ours.type, ours.documentation) == (family.type, family.documentation)
        for sample, same in zip(family.samples, ours.samples, strict=True):
            labels = {"exported_model_id" if name == "model_id" else name: text for name, text in sample.labels.items()}
            assert (same.name, same.value) == (sample.name, sample.value)
            assert same.labels == {**labels, "model_id": "m0"}


@pytest.mark.parametrize(
    "line",
    [
        "nonsense", "a{b=\"c\"}", "a{b=c} 1", "a{b=\"c} 1", "a 1 2 3", "a{b=\"c\\d\"} 1", "1a 2", "a{=\"c\"} 1",
        "a one",
        "# TYPE a nonsense", "a  1", "a{b=\"c\"d=\"e\"} 1", "a{b=\"\n\"} 1", "a 1 # {x=\"y\"} 1", "a\u2028 1",
    ],
)  # fmt: skip
def test_what_prometheus_would_refuse_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        read(f"good 1\n{line}\n", WHERE)


@pytest.mark.parametrize(
    "line", ["a 1", "a +Inf", "a NaN", "a -1.5e-07 1700000000000", "a{} 1", 'a{b="c",} 1', 'a{b="", c="\\"\\\\"} 1']
)
def test_what_prometheus_takes_is_taken(line: str) -> None:
    (family,) = read(line, WHERE).values()
    (sample,) = family.samples
    assert sample.startswith('a{model_id="m"')
    assert sample.split("} ")[1] == line.rpartition("} ")[2].removeprefix("a ")


def test_models_share_the_block_of_a_family() -> None:
    text = "# HELP a first\n# TYPE a gauge\na 1\n# HELP b_total of b\n# TYPE b_total counter\nb_total 2\n"
    assert through(text, text.replace("first", "second")) == (
        '# HELP a first\n# TYPE a gauge\na{model_id="m0"} 1\na{model_id="m1"} 1\n'
        '# HELP b_total of b\n# TYPE b_total counter\nb_total{model_id="m0"} 2\nb_total{model_id="m1"} 2\n'
    )


def test_one_name_is_of_one_kind() -> None:
    assert through("# TYPE a gauge\na 1\n", "# TYPE a counter\na 2\n") == '# TYPE a gauge\na{model_id="m0"} 1\n'


def test_nobody_speaks_for_the_gateway() -> None:
    assert through("fluidmcp_requests_total 7\n") == ""


def fleet(**models: dict[str, Any]) -> Gateway:
    return Gateway(parse_config({"llmModels": models}, environ={}))


def at(*ports: int) -> dict[str, Any]:
    endpoints = [{"base_url": f"http://127.0.0.1:{port}/v1"} for port in ports]
    return {"endpoints": endpoints if len(ports) > 1 else endpoints[0]}


def test_every_server_that_is_ready_is_asked_and_none_holds_it_up() -> None:
    with contextlib.ExitStack() as stack:
        kinds = ["good", "good", "none", "nonsense", "hang"]
        ports = [stack.enter_context(stub("--metrics", kind)) for kind in kinds]
        one, two, *bad = ports
        models = {"one": at(one), "several": at(one + 0, two), **{f"bad{n}": at(port) for n, port in enumerate(bad)}}
        port = stack.enter_context(serving(fleet(**models, gone=at(9))))
        url = f"http://127.0.0.1:{port}"

        def told() -> Samples:
            return samples_of(httpx.get(f"{url}/metrics", timeout=DEADLINE).text)

        states = "fluidmcp_model_state"
        names = [name for name in models if name != "gone"]
        eventually(lambda: all(value(told(), states, model_id=n, state="ready") for n in names), "all are ready")
        expected = {"one": 1, "0|several": 1, "1|several": 1, "bad0": 0, "bad1": 0, "bad2": 0}

        def are_told() -> Samples:
            """None is waited for longer than a little, which on a busy machine is too short for a good one, too."""
            samples = told()
            up = {where: count for (name, where), count in samples.items() if name == "fluidmcp_model_metrics_up"}
            up_by_name = {"|".join(sorted(text for _, text in where)): count for where, count in up.items()}
            return samples if up_by_name == expected else {}

        samples = eventually(are_told, f"they tell as expected: {expected}")
        for where in ({"model_id": "one"}, {"model_id": "several", "replica": "1"}):
            assert value(samples, VLLM, engine="0", model_name="m", **where) is not None
        assert value(samples, VLLM, engine="0", model_name="m", model_id="bad1") is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("said", "total"),
    [
        (["vllm:generation_tokens_total 5.0\n", 'vllm:generation_tokens_total{a="b c"} 1e+03\n'], 1005.0),
        (['x 1\nvllm:generation_tokens_total{engine="0"} 5.0\nvllm:generation_tokens_total{engine="1"} 2\n'], 7.0),
        (["vllm:generation_tokens_total 5.0\n", "other 1\n"], None),
        (["vllm:generation_tokens_total NaN\n"], None),
        (["vllm:generation_tokens_total_created 5.0\n"], None),
        ([None], None),
    ],
)
async def test_generated_tokens(said: list[str | None], total: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(servers: object, patience: float) -> list[tuple[dict[str, str], bytes | None]]:
        return [({"model_id": "m"}, None if text is None else text.encode()) for text in said]

    monkeypatch.setattr(server_metrics, "_ask", ask)
    assert await server_metrics.generated_tokens({}, 1.0) == {"m": total}
