"""What can go wrong, as exceptions; each knows how it is shown to the person who caused it.

``ConfigError`` is for the one who wrote the configuration, ``GatewayError`` for the client of an HTTP request. Turning
them into a line on the terminal or an HTTP answer happens once, in ``cli`` and ``gateway.app``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

__all__ = [
    "AmbiguousModel",
    "ConfigError",
    "FluidMCPError",
    "GatewayError",
    "HeadersTooLarge",
    "HostNotAllowed",
    "InvalidApiKey",
    "InvalidHost",
    "InvalidJSON",
    "InvalidPath",
    "InvalidTarget",
    "LifespanNotRunning",
    "McpEndpointRemoved",
    "MethodNotAllowed",
    "ModelFailed",
    "ModelNotFound",
    "ModelNotManaged",
    "ModelRequired",
    "ModelStarting",
    "ModelStopped",
    "OriginNotAllowed",
    "PathNotFound",
    "QueueFull",
    "QueueTimeout",
    "RequestTimeout",
    "RequestTooLarge",
    "ShuttingDown",
    "UpstreamDisconnected",
    "UpstreamError",
    "UpstreamInvalidResponse",
    "UpstreamTimeout",
    "UpstreamUnavailable",
    "UriTooLong",
    "ungrouped",
]


class FluidMCPError(Exception):
    """Base of every exception that this package raises on purpose."""


class ConfigError(FluidMCPError):
    """The configuration, or a setting, cannot be used.

    ``code`` is one of the contract's codes (``unknown_key``, ``port_mismatch`` …), ``path`` the JSON path of the fault
    (``llmModels.vllm.args[3]``, or ``line:column`` for a syntax error), ``problem`` what is wrong, ``remedy`` what to
    write instead. ``source`` is the file, or the name of the setting's variable. No value of a secret is in any of
    them.
    """

    def __init__(self, code: str, problem: str, *, remedy: str = "", path: str = "", source: str = "") -> None:
        self.code = code
        self.problem = problem
        self.remedy = remedy
        self.path = path
        self.source = source
        super().__init__(str(self))

    def __str__(self) -> str:
        """One line: ``code: file: path: problem; remedy``."""
        where = ": ".join(part for part in (self.code, self.source, self.path) if part)
        return f"{where}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class GatewayError(FluidMCPError):
    """A request that the gateway answers itself. Status, code and headers are the subclass's."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "api_error"
    default_retry_after: ClassVar[int | None] = None
    """Seconds to wait before trying again, where that does not depend on the case."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        seconds = self.default_retry_after if retry_after is None else retry_after
        self.retry_after = None if seconds is None else min(120, max(1, seconds))
        self.extra_headers = tuple(headers)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer besides content-type, content-length and x-request-id.

        A 5xx says whether trying again makes sense: ``Retry-After`` in seconds where waiting helps, else
        ``x-should-retry: false``, which the OpenAI clients obey.
        """
        headers = list(self.extra_headers)
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        elif self.status >= 500:
            headers.append((b"x-should-retry", b"false"))
        return headers

    def body(self, *, anthropic: bool = False) -> bytes:
        """The JSON body: OpenAI's error envelope, or Anthropic's on its Messages route."""
        if anthropic:
            envelope: dict[str, object] = {
                "type": "error",
                "error": {"type": _ANTHROPIC_TYPES.get(self.status, "api_error"), "message": self.message},
            }
        else:
            error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
            envelope = {"error": error}
        return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode()

    def event(self, *, anthropic: bool = False) -> bytes:
        """The same as one server-sent event, for a stream that has begun."""
        data = b"data: " + self.body(anthropic=anthropic) + b"\n\n"
        return b"event: error\n" + data if anthropic else data


# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class _InvalidRequest(GatewayError):
    status = 400
    type = "invalid_request_error"


class InvalidHost(_InvalidRequest):
    """Host header missing, doubled or malformed (RFC 9112 §3.2)."""

    code = "invalid_host"


class InvalidTarget(_InvalidRequest):
    """A request target or framing that no proxy may pass on."""

    code = "invalid_target"


class InvalidPath(_InvalidRequest):
    """Dot segments, encoded slashes or NULs in the path."""

    code = "invalid_path"


class InvalidJSON(_InvalidRequest):
    """A body that had to be read as JSON and is not."""

    code = "invalid_json"


class ModelRequired(_InvalidRequest):
    """The unified route without a model's name."""

    code = "model_required"


class AmbiguousModel(_InvalidRequest):
    """A served name that several models have."""

    code = "ambiguous_model"


class InvalidApiKey(GatewayError):
    """No key, or one that opens nothing."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """With the challenge that RFC 9110 §11.6.1 demands."""
        return [*super().headers, (b"www-authenticate", b"Bearer")]


class OriginNotAllowed(GatewayError):
    """A browser's request from another site."""

    status = 403
    code = "origin_not_allowed"
    type = "permission_error"


class HostNotAllowed(GatewayError):
    """A Host that this gateway does not answer to (DNS rebinding)."""

    status = 421
    code = "host_not_allowed"
    type = "permission_error"


class ModelNotFound(_InvalidRequest):
    """No model of that name."""

    status = 404
    code = "model_not_found"


class PathNotFound(_InvalidRequest):
    """No such route, or one that is closed."""

    status = 404
    code = "path_not_found"


class MethodNotAllowed(_InvalidRequest):
    """The route exists, but not for this method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message, headers=[(b"allow", allow.encode())])


class ModelNotManaged(_InvalidRequest):
    """Somebody else runs the model's server, so it can be neither started nor stopped here."""

    status = 409
    code = "model_not_managed"


class RequestTimeout(_InvalidRequest):
    """The client stopped sending its body."""

    status = 408
    code = "request_timeout"


class McpEndpointRemoved(_InvalidRequest):
    """The JSON-RPC route of the deprecated wrapper."""

    status = 410
    code = "mcp_endpoint_removed"


class RequestTooLarge(_InvalidRequest):
    """The body is over ``MAX_BODY_BYTES``."""

    status = 413
    code = "request_too_large"


class UriTooLong(_InvalidRequest):
    """The request target is over its limit."""

    status = 414
    code = "uri_too_long"


class HeadersTooLarge(_InvalidRequest):
    """Too many headers, or too much of them."""

    status = 431
    code = "headers_too_large"


class QueueFull(GatewayError):
    """``max_queue`` requests wait already."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"


class _Unavailable(GatewayError):
    status = 503
    type = "service_unavailable"


class ModelStarting(_Unavailable):
    """The model is still loading."""

    code = "model_starting"


class ModelStopped(_Unavailable):
    """The model was stopped on purpose."""

    code = "model_stopped"


class ModelFailed(_Unavailable):
    """The model does not start; the message says why."""

    code = "model_failed"


class QueueTimeout(_Unavailable):
    """The request waited ``queue_timeout`` seconds for its turn."""

    code = "queue_timeout"


class ShuttingDown(_Unavailable):
    """The gateway is ending."""

    code = "shutting_down"


class LifespanNotRunning(_Unavailable):
    """The host app did not run the gateway's lifespan."""

    code = "lifespan_not_running"


class UpstreamError(GatewayError):
    """Something went wrong between the gateway and a model's server."""

    type = "upstream_error"


class UpstreamUnavailable(UpstreamError):
    """Connecting failed: not a byte of the request has left, so it may be tried again."""

    status = 503
    code = "upstream_unavailable"
    default_retry_after = 2


class UpstreamDisconnected(UpstreamError):
    """The server closed the connection before its answer was complete."""

    status = 502
    code = "upstream_disconnected"


class UpstreamInvalidResponse(UpstreamError):
    """The server's answer is not HTTP/1.1."""

    status = 502
    code = "upstream_invalid_response"


class UpstreamTimeout(UpstreamError):
    """The server was too slow: first byte, or silence inside a stream."""

    status = 504
    code = "upstream_timeout"


@contextmanager
def ungrouped() -> Iterator[None]:
    """Give the caller its own exception back when a task group around it has put just that one into a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
