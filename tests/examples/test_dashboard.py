"""The Grafana dashboard asks for nothing that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.models.state import ModelState
from tests.serving import STUB, eventually, stub

DASHBOARD = json.loads((STUB.parent / "grafana-dashboard.json").read_text())
NAME = re.compile(r"\b((?:fluidmcp_|vllm:)\w+)")
SELECTION = re.compile(r"((?:fluidmcp_|vllm:)\w+)\{([^}]*)\}")
GROUPED = re.compile(r"\bby \(([\w, ]+)\)")


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


EXPRESSIONS = [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """The names of the samples that a gateway tells, with their labels, when everything has happened once."""
    with stub() as port:
        endpoints = [{"base_url": f"http://127.0.0.1:{port}/v1"}, {"base_url": "http://127.0.0.1:9/v1"}]
        config = parse_config({"llmModels": {"m": {"endpoints": endpoints}}}, environ={})
        with TestClient(Gateway(config)) as client:
            eventually(lambda: client.get("/ready").status_code == 200, "ready")
            body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
            assert client.post("/m/v1/chat/completions", json=body).status_code == 200
            # A server that does not tell at once is left out, and any may be late on a busy machine.
            text = eventually(lambda: "vllm:" in (found := client.get("/metrics").text) and found, "the server tells")
            families = list(text_string_to_metric_families(text))
    names: dict[str, set[str]] = {family.name: set() for family in families}  # one without a sample yet
    for family in families:
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_is_told(told: dict[str, set[str]], expression: str) -> None:
    names = NAME.findall(expression)
    assert names
    assert set(names) <= set(told)
    known = set().union(*(told[name] for name in names)) | {"model_id"}
    asked = {label for _, labels in SELECTION.findall(expression) for label in re.findall(r"(\w+)(?:=|!)", labels)}
    grouped = {label.strip() for labels in GROUPED.findall(expression) for label in labels.split(",")}
    assert asked | grouped <= known


def test_a_wrong_name_would_be_seen(told: dict[str, set[str]]) -> None:
    assert "fluidmcp_requests" not in {name for expression in EXPRESSIONS for name in NAME.findall(expression)}
    assert {"fluidmcp_requests_total", "vllm:generation_tokens_total"} <= set(told)
    assert "vllm:nothing" not in told


def test_every_metric_of_the_gateway_is_shown(told: dict[str, set[str]]) -> None:
    text = " ".join(EXPRESSIONS)
    ours = {name for name in told if name.startswith("fluidmcp_") and not re.search(r"_(sum|count|created)$", name)}
    hidden = {name for name in ours if not re.search(rf"\b{name}(_total|_bucket)?\b", text)}
    assert not hidden


def test_it_is_a_dashboard() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    (variable,) = (one for one in DASHBOARD["templating"]["list"] if one["name"] == "model")
    assert "fluidmcp_model_state" in variable["query"]["query"]


def test_the_numbers_of_the_states_are_theirs() -> None:
    """Grafana shows a number as a word; the query makes the number of the state."""
    (timeline,) = (panel for panel in panels() if panel["type"] == "state-timeline")
    shown = {
        int(number): told["text"]
        for mapping in timeline["fieldConfig"]["defaults"]["mappings"]
        for number, told in mapping["options"].items()
    }
    asked = re.findall(r"(\d+) \* [^*]*state=\"(\w+)\"", timeline["targets"][0]["expr"])
    assert {int(number): state for number, state in asked} == {n: state for n, state in shown.items() if n}
    assert set(shown.values()) == set(ModelState)
