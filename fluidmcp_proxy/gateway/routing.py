"""From a target to what shall happen: pure, over one immutable table.

It knows which paths exist, which methods they take and which routes of a model's server are closed; it does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.errors import McpEndpointRemoved, MethodNotAllowed, ModelNotFound, PathNotFound
from fluidmcp_proxy.gateway.routes import (
    Action,
    Forward,
    ListedModel,
    Logs,
    ModelPage,
    Page,
    Route,
    StaticFile,
    Unified,
    Verb,
)
from fluidmcp_proxy.gateway.target import Target

__all__ = ["Router", "is_public", "speaks_anthropic"]

_ROOT_ROUTES = frozenset({"tokenize", "detokenize", "rerank", "score", "classify", "pooling"})
"""Routes that vLLM has beside ``/v1``; they take POST."""

_CLOSED = frozenset(
    {
        "load_lora_adapter",
        "unload_lora_adapter",
        "sleep",
        "wake_up",
        "is_sleeping",
        "collective_rpc",
        "reset_prefix_cache",
        "reset_mm_cache",
        "reset_encoder_cache",
        "server_info",
        "scale_elastic_ep",
        "is_scaling_elastic_ep",
        "invocations",
        "pause",
        "resume",
        "is_paused",
        "update_weights",
        "init_weight_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
        "get_world_size",
        "metrics",
        "docs",
        "redoc",
        "openapi.json",
    }
)
"""Routes that change or reveal the server, by their first segment under ``/v1/``. From vLLM's ``entrypoints/serve``
and its LoRA and SageMaker routers."""

_LABELLED = frozenset(
    {
        "v1/audio/speech",
        "v1/audio/transcriptions",
        "v1/audio/translations",
        "v1/chat/completions",
        "v1/classify",
        "v1/completions",
        "v1/detokenize",
        "v1/embeddings",
        "v1/images/generations",
        "v1/messages",
        "v1/messages/count_tokens",
        "v1/models",
        "v1/moderations",
        "v1/pooling",
        "v1/realtime",
        "v1/rerank",
        "v1/responses",
        "v1/score",
        "v1/tokenize",
    }
)
"""Paths below a model whose label is their own name; there are few of them, whatever clients ask for."""

# TRACE echoes what proxies add (RFC 9110 §9.3.8), CONNECT asks for a tunnel.
_REFUSED_METHODS = frozenset({"TRACE", "TRACK", "CONNECT"})
_ANY_METHOD = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

_STATIC = {f"/static/{name}": name for name in ("page.css", "page.js")}
_PUBLIC = frozenset({Page.HEALTH.value, Page.READY.value, Page.STATUS.value, *_STATIC})
_Shown = TypeVar("_Shown", bound=Page | ModelPage | StaticFile | ListedModel | Logs)


def speaks_anthropic(path: str) -> bool:
    """Whether ``path`` is of Anthropic's Messages API, whose errors have a form of their own."""
    return path.endswith("/v1/messages") or "/v1/messages/" in path


def is_public(path: str) -> bool:
    """Whether ``path`` is there for people without a key, too: it tells them nothing of the models."""
    return path in _PUBLIC


class Router:
    """The routes of one configuration; those for administrators only where there are any."""

    def __init__(self, models: Mapping[str, ModelConfig], *, is_administered: bool = False) -> None:
        self._models = MappingProxyType(dict(models))
        self._is_administered = is_administered
        self._roots = {name: _root(model) for name, model in models.items()}
        # Clients ask for the same few things.
        self._find = lru_cache(maxsize=256)(self._find_uncached)
        self._find_named = lru_cache(maxsize=256)(self._find_named_uncached)

    @property
    def names(self) -> Collection[str]:
        """The ids of the models."""
        return self._models.keys()

    def knows(self, target: Target) -> bool:
        """Whether the first segment is a model's id, whatever follows."""
        return target.path.split("/", 2)[1] in self._models

    def route(self, method: str, target: Target) -> Route:
        """What ``method`` on ``target`` asks for.

        Raises:
            ModelNotFound: ``/x/v1/…`` with no model x; the message lists those there are.
            PathNotFound: anything else that does not exist, or is closed.
            MethodNotAllowed: with ``Allow``.
            McpEndpointRemoved: the JSON-RPC route of the deprecated wrapper.
        """
        route = self._find(method, target.raw, target.path)
        return _with_query(route, target.query) if target.query and isinstance(route, Forward) else route

    def named(self, model: str, method: str, target: Target) -> Forward:
        """What ``method`` on a ``target`` below ``/v1/`` asks for, now that its model is known: what it would with the
        model's id before it. Raises as ``route`` does.
        """
        route = self._find_named(model, method, target.raw, target.path)
        return _with_query(route, target.query) if target.query else route

    def _find_named_uncached(self, model: str, method: str, raw: bytes, path: str) -> Forward:
        route = self._find_uncached(method, b"/%b%b" % (model.encode(), raw), f"/{model}{path}")
        assert isinstance(route, Forward)
        return route

    def _find_uncached(self, method: str, raw: bytes, path: str) -> Route:
        first, _, rest = path[1:].partition("/")
        if first in self._models:
            return self._model_route(first, rest, method, raw)
        if first == "models" and rest in self._models:
            return _only_get(method, ModelPage(rest))
        if first == "models" and self._is_administered and (found := self._admin_route(rest, method)):
            return found
        for page in Page:
            if path == page.value:
                return _only_get(method, page)
        if path in _STATIC:
            return _only_get(method, StaticFile(_STATIC[path]))
        if first == "v1" and rest:
            return self._unified_route(rest, method)
        if rest == "v1" or rest.startswith("v1/"):
            raise ModelNotFound(f"There is no LLM model '{first[:64]}'. {self._there_are()}")
        if first == "models" and rest:
            raise ModelNotFound(f"There is no LLM model '{rest[:64]}'. {self._there_are()}")
        raise PathNotFound(f"There is nothing at this path. {self._there_are()} Their API is at /v1/… and /MODEL/v1/….")

    def route_websocket(self, target: Target) -> Forward:
        """Which model's server a WebSocket on ``target`` is for; raises as ``route`` does for a GET."""
        route = self.route("GET", target)
        if not isinstance(route, Forward):
            raise PathNotFound(f"This path is for HTTP. {self._there_are()} Their WebSockets are at /MODEL/v1/…")
        return route

    def _unified_route(self, rest: str, method: str) -> ListedModel | Unified:
        if rest.startswith("models/"):
            return _only_get(method, ListedModel(rest[7:]))
        _refuse_method(method)
        extra_paths = [path for model in self._models.values() for path in model.extra_paths]
        if rest.split("/", 1)[0] in _CLOSED and not _is_open("/v1/" + rest, extra_paths):
            raise _closed()
        return Unified(_label("v1/" + rest))

    def _model_route(self, name: str, rest: str, method: str, raw: bytes) -> Forward:
        _refuse_method(method)
        if rest == "mcp":
            raise McpEndpointRemoved(
                f"The JSON-RPC endpoint is gone. Send OpenAI requests instead: POST /{name}/v1/chat/completions."
            )
        below = raw.split(b"/", 2)[2] if rest else b""
        forward = Forward(name, b"%b/%b" % (self._roots[name], below), _label(rest))
        if _is_open("/" + rest, self._models[name].extra_paths):
            return forward
        if rest in _ROOT_ROUTES:
            if method != "POST":
                raise MethodNotAllowed(f"/{name}/{rest} takes POST.", allow="POST")
            return forward
        if not rest.startswith("v1/") or rest == "v1/":
            raise PathNotFound(f"There is nothing at this path. The API of LLM model '{name}' is at /{name}/v1/…")
        if rest.split("/", 2)[1] in _CLOSED:
            raise _closed()
        return forward

    def _admin_route(self, rest: str, method: str) -> Action | Logs | None:
        model, _, asked = rest.partition("/")
        if model not in self._models:
            return None
        if asked == "logs":
            return _only_get(method, Logs(model))
        if asked not in list(Verb):
            return None
        if method != "POST":
            raise MethodNotAllowed(f"This path takes POST, not {method}.", allow="POST")
        return Action(model, Verb(asked))

    def _there_are(self) -> str:
        return f"The models are: {', '.join(self._models)}."


def _with_query(route: Forward, query: bytes) -> Forward:
    return Forward(route.model, b"%b?%b" % (route.target, query), route.label)


def _root(model: ModelConfig) -> bytes:
    return model.endpoint.root.encode("ascii") if model.endpoint else b""


def _label(path: str) -> str:
    return f"/{path}" if path in _LABELLED or path in _ROOT_ROUTES else "other"


def _refuse_method(method: str) -> None:
    if method in _REFUSED_METHODS:
        raise MethodNotAllowed(f"{method} is not forwarded.", allow=_ANY_METHOD)


def _closed() -> PathNotFound:
    return PathNotFound("This route of the model's server is closed; extra_paths in its configuration opens it.")


def _only_get(method: str, route: _Shown) -> _Shown:
    if method not in ("GET", "HEAD"):
        raise MethodNotAllowed(f"This path takes GET, not {method}.", allow="GET, HEAD")
    return route


def _is_open(path: str, extra_paths: Iterable[str]) -> bool:
    return any(path.startswith(open_[:-1]) if open_.endswith("*") else path == open_ for open_ in extra_paths)
