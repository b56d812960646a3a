"""The Grafana dashboard asks for nothing that is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
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
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


@pytest.fixture(scope="module")
def exposition() -> str:
    """What a gateway tells when everything has happened once."""
    with stub() as port:
        endpoints = [{"base_url": f"http://127.0.0.1:{port}/v1"}, {"base_url": "http://127.0.0.1:9/v1"}]
        config = parse_config({"llmModels": {"m": {"endpoints": endpoints}}}, environ={})
        with TestClient(Gateway(config)) as client:
            eventually(lambda: client.get("/ready").status_code == 200, "ready")
            body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
            assert client.post("/m/v1/chat/completions", json=body).status_code == 200
            # A server that does not tell at once is left out, and any may be late on a busy machine.
            found = eventually(lambda: "vllm:" in (text := client.get("/metrics").text) and text, "the server tells")
            return str(found)


@pytest.fixture(scope="module")
def told(exposition: str) -> dict[str, set[str]]:
    """The names of its samples, with their labels."""
    families = list(text_string_to_metric_families(exposition))
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


# What Prometheus itself says, where it is installed


def promtool(*arguments: str, stdin: str = "") -> tuple[int, str]:
    assert PROMTOOL is not None
    command = [PROMTOOL, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def in_prometheus(expression: str) -> str:
    """With what Grafana puts in place of its variables."""
    return expression.replace("$__rate_interval", "1m").replace("$model", ".+")


@needs_promtool
def test_prometheus_finds_no_fault_with_what_is_told(exposition: str) -> None:
    """But for vLLM's names, which are vLLM's."""
    _, said = promtool("check", "metrics", stdin=exposition)
    assert [line for line in said.splitlines() if not line.startswith("vllm:")] == []
    assert "fluidmcp_x" in promtool("check", "metrics", stdin="# TYPE fluidmcp_x counter\nfluidmcp_x 1\n")[1]


@needs_promtool
@pytest.mark.parametrize("more", [[], ["sum by (model_id (fluidmcp_model_state)"]])
def test_prometheus_understands_every_expression(tmp_path: Path, more: list[str]) -> None:
    expressions = map(in_prometheus, [*EXPRESSIONS, *more])
    rules = [{"record": f"panel_{number}", "expr": expression} for number, expression in enumerate(expressions)]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    status, said = promtool("check", "rules", str(file))
    assert (status != 0) is bool(more), said


@needs_promtool
@pytest.mark.parametrize(("complete", "refused", "share"), [(6, 0, 0), (0, 6, 1), (3, 3, 0.5)])
def test_the_share_of_what_was_not_complete(tmp_path: Path, complete: int, refused: int, share: float) -> None:
    """Also where one of the two has never happened, so that there is no such sample."""
    (panel,) = (panel for panel in panels() if panel["title"] == "Not complete")
    series = [
        {"series": f'fluidmcp_requests_total{{model_id="m", outcome="{outcome}"}}', "values": f"0+{count}x10"}
        for outcome, count in (("complete", complete), ("refused", refused))
        if count
    ]
    expected = [{"labels": '{model_id="m"}', "value": share}]
    asked = {"expr": in_prometheus(panel["targets"][0]["expr"]), "eval_time": "2m", "exp_samples": expected}
    test = {"interval": "15s", "input_series": series, "promql_expr_test": [asked]}
    file = tmp_path / "test.json"
    file.write_text(json.dumps({"tests": [test]}))
    status, said = promtool("test", "rules", str(file))
    assert status == 0, said
