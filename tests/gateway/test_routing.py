"""Routes: what is forwarded where, and what is refused how."""

from __future__ import annotations

from typing import Any

import pytest

from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.gateway.routes import Forward, ListedModel, ModelPage, Page, Route, StaticFile, Unified
from fluidmcp_proxy.gateway.routing import Router, speaks_anthropic
from fluidmcp_proxy.gateway.target import Target, read_target

CONFIG: dict[str, Any] = {
    "llmModels": {
        "vllm": {"command": "vllm", "args": ["serve", "m", "--port", "8001"]},
        "far": {"endpoints": {"base_url": "https://far.example/api/v1"}},
        "open": {
            "command": "vllm",
            "args": ["serve", "m", "--port", "8002"],
            "extra_paths": ["/metrics", "/v1/load_lora_adapter", "/admin/*"],
        },
    }
}
ROUTER = Router(parse_config(CONFIG, environ={}).models)


def target_of(target: str) -> Target:
    raw, _, query = target.encode().partition(b"?")
    return read_target({"type": "http", "path": target, "raw_path": raw, "query_string": query})


def route(method: str, target: str) -> Route:
    return ROUTER.route(method, target_of(target))


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("POST", "/vllm/v1/chat/completions", Forward("vllm", b"/v1/chat/completions", "/v1/chat/completions")),
        ("GET", "/vllm/v1/models", Forward("vllm", b"/v1/models", "/v1/models")),
        ("DELETE", "/vllm/v1/responses/r%201?a=b&c", Forward("vllm", b"/v1/responses/r%201?a=b&c")),
        ("OPTIONS", "/vllm/v1/anything/new", Forward("vllm", b"/v1/anything/new")),
        ("POST", "/vllm/v1/messages", Forward("vllm", b"/v1/messages", "/v1/messages")),
        ("POST", "/vllm/v1/audio/speech", Forward("vllm", b"/v1/audio/speech", "/v1/audio/speech")),
        ("POST", "/vllm/tokenize", Forward("vllm", b"/tokenize", "/tokenize")),
        ("POST", "/far/v1/chat/completions", Forward("far", b"/api/v1/chat/completions", "/v1/chat/completions")),
        ("POST", "/far/rerank", Forward("far", b"/api/rerank", "/rerank")),
        ("GET", "/open/metrics", Forward("open", b"/metrics")),
        ("POST", "/open/v1/load_lora_adapter", Forward("open", b"/v1/load_lora_adapter")),
        ("PUT", "/open/admin/a/b", Forward("open", b"/admin/a/b")),
        ("GET", "/health", Page.HEALTH),
        ("HEAD", "/ready", Page.READY),
        ("GET", "/models", Page.MODELS),
        ("HEAD", "/", Page.STATUS),
        ("GET", "/static/page.js", StaticFile("page.js")),
        ("GET", "/models/vllm", ModelPage("vllm")),
        ("GET", "/v1/models", Page.LIST),
        ("HEAD", "/v1/models/org/name:tag", ListedModel("org/name:tag")),
    ],
)
def test_routes(method: str, target: str, expected: Route) -> None:
    assert route(method, target) == expected


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("GET", "/nobody/v1/models", 404, "model_not_found"),
        ("GET", "/VLLM/v1/models", 404, "model_not_found"),
        ("GET", "/models/nobody", 404, "model_not_found"),
        ("GET", "/nobody/x", 404, "path_not_found"),
        ("GET", "/vllm", 404, "path_not_found"),
        ("GET", "/vllm/", 404, "path_not_found"),
        ("GET", "/vllm/v1", 404, "path_not_found"),
        ("GET", "/vllm/v1/", 404, "path_not_found"),
        ("GET", "/vllm/v2/models", 404, "path_not_found"),
        ("GET", "/vllm/metrics", 404, "path_not_found"),
        ("GET", "/vllm/v1/metrics", 404, "path_not_found"),
        ("POST", "/vllm/v1/load_lora_adapter", 404, "path_not_found"),
        ("POST", "/vllm/v1/%6coad_lora_adapter", 404, "path_not_found"),
        ("POST", "/vllm/v1/unload_lora_adapter/", 404, "path_not_found"),
        ("POST", "/vllm/sleep", 404, "path_not_found"),
        ("POST", "/vllm/v1/collective_rpc", 404, "path_not_found"),
        ("POST", "/vllm/mcp", 410, "mcp_endpoint_removed"),
        ("GET", "/vllm/tokenize", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("TRACE", "/vllm/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/models/vllm", 405, "method_not_allowed"),
        ("GET", "/healthz", 404, "path_not_found"),
        ("GET", "/open/admin", 404, "path_not_found"),
        ("GET", "/v1", 404, "path_not_found"),
        ("GET", "/v1/", 404, "path_not_found"),
        ("POST", "/v1/sleep", 404, "path_not_found"),
        ("GET", "/v1/metrics", 404, "path_not_found"),
        ("TRACE", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/m", 405, "method_not_allowed"),
    ],
)
def test_refusals(method: str, target: str, status: int, code: str) -> None:
    with pytest.raises(GatewayError) as caught:
        route(method, target)
    assert (caught.value.status, caught.value.code) == (status, code)


@pytest.mark.parametrize(
    ("method", "target", "label"),
    [
        ("POST", "/vllm/v1/embeddings?key=secret", "/v1/embeddings"),
        ("POST", "/v1/embeddings", "/v1/embeddings"),
        ("POST", "/vllm/rerank", "/rerank"),
        ("GET", "/vllm/v1/responses/r-1", "other"),
        ("GET", "/vllm/v1/any/thing", "other"),
        ("GET", "/v1/any/thing", "other"),
        ("GET", "/open/metrics", "other"),
        ("GET", "/health", "/health"),
        ("GET", "/models/vllm", "/models/{model}"),
        ("GET", "/v1/models/org/name", "/v1/models/{name}"),
    ],
)
def test_labels_are_few_whatever_is_asked(method: str, target: str, label: str) -> None:
    assert route(method, target).label == label


def named(model: str, method: str, target: str) -> Route:
    assert isinstance(route(method, target), Unified)
    return ROUTER.named(model, method, target_of(target))


def test_what_names_its_model_goes_where_the_prefix_leads() -> None:
    for target in ("/v1/chat/completions", "/v1/responses/r%201?a=b&model=x", "/v1/messages/count_tokens"):
        for model in ("vllm", "far"):
            assert named(model, "POST", target) == route("POST", f"/{model}{target}")
    assert named("open", "POST", "/v1/load_lora_adapter") == route("POST", "/open/v1/load_lora_adapter")
    with pytest.raises(GatewayError, match="is closed"):
        named("vllm", "POST", "/v1/load_lora_adapter")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/vllm/v1/messages", True),
        ("/llm/vllm/v1/messages/count_tokens", True),
        ("/nobody/v1/messages", True),
        ("/v1/messages", True),
        ("/vllm/v1/messagesx", False),
        ("/vllm/v1/chat/completions", False),
    ],
)
def test_the_messages_api(path: str, expected: bool) -> None:
    assert speaks_anthropic(path) is expected


def test_messages_help() -> None:
    with pytest.raises(GatewayError, match="The models are: vllm, far, open"):
        route("GET", "/nobody/v1/models")
    with pytest.raises(GatewayError, match="POST /vllm/v1/chat/completions"):
        route("POST", "/vllm/mcp")
    with pytest.raises(GatewayError) as caught:
        route("GET", "/vllm/tokenize")
    assert (b"allow", b"POST") in caught.value.headers
