"""Request targets: what no model's server may ever see."""

from __future__ import annotations

from typing import Any

import pytest

from fluidmcp_proxy.errors import GatewayError
from fluidmcp_proxy.gateway.target import MAX_TARGET_BYTES, read_target


def scope(raw: bytes | None, **keys: Any) -> dict[str, Any]:
    path = "/" if raw is None else raw.decode("latin-1")
    return {"type": "http", "path": path, "raw_path": raw, "query_string": b"", "root_path": "", **keys}


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/vllm/v1/models", "/vllm/v1/models"),
        (b"/", "/"),
        (b"/vllm/v1/models/", "/vllm/v1/models/"),
        (b"/a%20b/%C3%A9", "/a b/é"),
        (b"/vllm/v1/a..b/.hidden/...", "/vllm/v1/a..b/.hidden/..."),
        (b"/vllm/v1/files/a:b@c", "/vllm/v1/files/a:b@c"),
        (b"/vllm/v1/100%25/%25xy", "/vllm/v1/100%/%xy"),  # decoded once, as the server does it
    ],
)
def test_good(raw: bytes, path: str) -> None:
    target = read_target(scope(raw, query_string=b"a=%2F&b=.."))
    assert (target.raw, target.path, target.query) == (raw, path, b"a=%2F&b=..")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"/vllm/v1/../metrics", "invalid_path"),
        (b"/vllm/v1/..", "invalid_path"),
        (b"/./vllm/v1/models", "invalid_path"),
        (b"/vllm/v1/%2e%2e/metrics", "invalid_path"),
        (b"/vllm/v1/.%2E/metrics", "invalid_path"),
        (b"/vllm/v1/%2e/x", "invalid_path"),
        (b"/vllm/v1%2f..%2fmetrics", "invalid_path"),
        (b"/vllm/v1%2Fmodels", "invalid_path"),
        (b"/vllm/v1/a%5cb", "invalid_path"),
        (b"/vllm/v1/a\\..\\b", "invalid_path"),
        (b"/vllm/v1/a%00b", "invalid_path"),
        (b"/vllm/v1/%252e%252e/metrics", "invalid_path"),
        (b"/vllm/v1/.%25252E/metrics", "invalid_path"),
        (b"/vllm/v1%252fmodels", "invalid_path"),
        (b"/vllm/v1/%25%32%65%2e/metrics", "invalid_path"),
        (b"/vllm/v1/%2573leep", "invalid_path"),
        (b"/vllm//v1/models", "invalid_path"),
        (b"//vllm/v1/models", "invalid_path"),
        (b"/vllm/v1/models//", "invalid_path"),
        (b"/v1/models%2fa", "invalid_path"),
        (b"/v1/models/a%2f%2fb", "invalid_path"),
        (b"/v1/models/%2fa", "invalid_path"),
        (b"/v1/models/..%2fhealth", "invalid_path"),
        (b"/v1/models/a%2F%2e%2e%2F%2e%2e%2Fm", "invalid_path"),
        (b"/v1/models/a%5cb", "invalid_path"),
        (b"/m/v1/models/a%2fb", "invalid_path"),
        (b"http://other/vllm/v1/models", "invalid_target"),
        (b"*", "invalid_target"),
        (b"vllm/v1/models", "invalid_target"),
        (b"@other/vllm", "invalid_target"),
        (b"", "invalid_target"),
        (b"/vllm/v1/a b", "invalid_target"),
        (b"/vllm/v1/\xc3\xa9", "invalid_target"),
        (b"/vllm/v1/a\r\nx: y", "invalid_target"),
        (b"/vllm/v1/a%", "invalid_target"),
        (b"/vllm/v1/a%zz", "invalid_target"),
        (b"/vllm/v1/a#b", "invalid_target"),
        (b"/" + b"a" * MAX_TARGET_BYTES, "uri_too_long"),
    ],
)
def test_bad(raw: bytes, code: str) -> None:
    with pytest.raises(GatewayError) as caught:
        read_target(scope(raw))
    assert caught.value.code == code


def test_a_name_in_the_list_may_have_its_slashes_encoded() -> None:
    for mount in ("", "/llm"):
        target = read_target(scope(mount.encode() + b"/v1/models/org%2fname%2Ftag%20", root_path=mount))
        assert (target.raw, target.path) == (b"/v1/models/org/name/tag%20", "/v1/models/org/name/tag ")


@pytest.mark.parametrize("query", [b"a b", b"a\r\nb", b"\xff", b"a#b"])
def test_bad_query(query: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        read_target(scope(b"/vllm/v1/models", query_string=query))
    assert caught.value.code == "invalid_target"


@pytest.mark.parametrize(
    ("raw", "root_path", "below"),
    [
        (b"/llm/vllm/v1/models", "/llm", b"/vllm/v1/models"),
        (b"/llm", "/llm", b"/"),
        (b"/llm/", "/llm", b"/"),
        (b"/a/b/vllm/v1", "/a/b", b"/vllm/v1"),
        (b"/a%20b/vllm/v1", "/a b", b"/vllm/v1"),
        (b"/vllm/v1/models", "/llm", b"/vllm/v1/models"),  # a server that leaves root_path out of the path
        (b"/llm/vllm/v1/models", "/llm/", b"/vllm/v1/models"),
    ],
)
def test_below_the_mount_point(raw: bytes, root_path: str, below: bytes) -> None:
    assert read_target(scope(raw, root_path=root_path)).raw == below


def test_without_raw_path() -> None:
    assert read_target(scope(None, path="/vllm/v1/a b")).raw == b"/vllm/v1/a%20b"
    with pytest.raises(GatewayError):
        read_target(scope(None, path="/vllm/v1/../metrics"))
