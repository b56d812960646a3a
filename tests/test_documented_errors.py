"""The table of errors in docs/http.md against a running gateway: status, code, and the header about trying again."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import fluidmcp_proxy
from fluidmcp_proxy import Gateway, errors
from fluidmcp_proxy.config.load import parse_config
from tests.serving import STUB, eventually, free_port, stub

PAGE = (Path(__file__).parent.parent / "docs" / "http.md").read_text()
TABLE = {
    code: (int(status), headers.strip("`"))
    for status, code, headers in re.findall(r"^\| (\d{3}) \| `(\w+)` \| .* \| ?(.*?) ?\|$", PAGE, re.MULTILINE)
}
STALLED = {"x-stub-answer-delay": "600"}


def gateway(**entry: Any) -> Gateway:
    return Gateway(parse_config({"llmModels": {"m": entry}}, environ={}))


def at(port: int, **keys: Any) -> Gateway:
    return gateway(endpoints={"base_url": f"http://127.0.0.1:{port}/v1"}, **keys)


def launching(*arguments: str) -> Gateway:
    return gateway(command=sys.executable, args=[str(STUB), "serve", "m", "--port", str(free_port()), *arguments])


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUIDMCP_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setenv("FLUIDMCP_RUNTIME_DIR", str(tmp_path / "run"))


@contextmanager
def running(app: Gateway) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def with_settings(**settings: Any) -> Gateway:
    models = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}}
    return Gateway(parse_config({"llmModels": models, "gateway": settings}, environ={}))


def invalid_api_key() -> Any:
    with running(with_settings(api_keys=["0123456789abcdef"])) as client:
        return client.get("/m/v1/models")


def model_starting() -> Any:
    with running(launching("--load-time", "600")) as client:
        return client.get("/m/v1/models", headers={"prefer": "wait=0"})


def model_failed() -> Any:
    with running(gateway(command="/nowhere/vllm", args=["serve", "m", "--port", str(free_port())])) as client:
        return client.get("/m/v1/models")


def model_stopped() -> Any:
    app = launching()
    with running(app) as client:
        eventually(lambda: client.get("/ready").status_code == 200, "ready")
        assert app._fleet is not None
        assert client.portal is not None
        client.portal.call(app._fleet.scheduler.stop, "m")
        return client.get("/m/v1/models")


def shutting_down() -> Any:
    app = at(free_port())
    with running(app) as client:
        assert client.portal is not None
        client.portal.call(app.begin_shutdown)
        return client.get("/m/v1/models")


def lifespan_not_running() -> Any:
    return TestClient(at(free_port())).get("/m/v1/models")


def upstream_unavailable() -> Any:
    with running(at(free_port())) as client:
        return client.get("/m/v1/models")


def upstream_disconnected() -> Any:
    with stub() as port, running(at(port)) as client:
        return client.post("/m/v1/raw", content=b"")


def upstream_invalid_response() -> Any:
    with stub() as port, running(at(port)) as client:
        return client.post("/m/v1/raw", content=b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


def upstream_timeout() -> Any:
    with stub() as port, running(at(port, first_byte_timeout=0.1)) as client:
        return client.post("/m/v1/completions", json={"model": "m", "prompt": "x"}, headers=STALLED)


def ask_while_it_is_occupied(headers: dict[str, str], **keys: Any) -> Any:
    """The answer of a model whose only place is taken."""
    with stub() as port:
        app = at(port, max_concurrency=1, **keys)
        with running(app) as client:
            assert app._fleet is not None
            assert client.portal is not None
            lease = app._fleet.scheduler.lease("m")
            client.portal.call(lease.__aenter__)
            answer = client.get("/m/v1/models", headers=headers)
            client.portal.call(lease.__aexit__, None, None, None)
            assert client.get("/m/v1/models").status_code == 200
            return answer


def queue_full() -> Any:
    return ask_while_it_is_occupied({}, max_queue=0)


def queue_timeout() -> Any:
    return ask_while_it_is_occupied({"prefer": "wait=0"})


def method_not_allowed() -> Any:
    with running(at(free_port())) as client:
        return client.post("/health")


PROVOKED = (
    model_starting, model_failed, model_stopped, shutting_down, lifespan_not_running, upstream_unavailable,
    upstream_disconnected, upstream_invalid_response, upstream_timeout, method_not_allowed, queue_full, queue_timeout,
    invalid_api_key,
)  # fmt: skip


@pytest.mark.parametrize("provoke", PROVOKED, ids=lambda provoke: provoke.__name__)
def test_what_the_table_says_of_headers(provoke: Any) -> None:
    answer = provoke()
    status, header = TABLE[provoke.__name__]
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, provoke.__name__)
    told = {name for name in ("allow", "retry-after", "www-authenticate", "x-should-retry") if name in answer.headers}
    assert told == {header.partition(":")[0].lower()}
    if "retry-after" in told:
        assert 1 <= int(answer.headers["retry-after"]) <= 120


def made() -> dict[str, set[str]]:
    """The exceptions of ``errors`` that the package makes: name to the keyword arguments seen."""
    seen: dict[str, set[str]] = {}
    for path in Path(fluidmcp_proxy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
                seen.setdefault(node.func.id, set()).update(str(keyword.arg) for keyword in node.keywords)
    return seen


def test_every_error_that_is_raised_is_in_the_table() -> None:
    kinds = [getattr(errors, name) for name in made()]
    raised = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, errors.GatewayError)]
    assert {kind.code: kind.status for kind in raised} == {code: status for code, (status, _) in TABLE.items()}


def test_no_header_is_left_unseen() -> None:
    assert {code for code, (_, header) in TABLE.items() if header} == {p.__name__ for p in PROVOKED}
