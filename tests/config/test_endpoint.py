"""What a ``base_url`` means, and which ones mean nothing."""

from __future__ import annotations

import pytest

from fluidmcp_proxy.config.endpoint import canonical_host, local_endpoint, parse_base_url
from fluidmcp_proxy.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://localhost:8001/v1", ("http", "localhost", 8001, "")),
        ("http://localhost:8001/v1/", ("http", "localhost", 8001, "")),
        ("http://localhost:8001", ("http", "localhost", 8001, "")),
        ("http://localhost:8001/", ("http", "localhost", 8001, "")),
        ("HTTP://LocalHost:8001/v1", ("http", "localhost", 8001, "")),
        ("https://host/api/v1", ("https", "host", 443, "/api")),
        ("https://host/api", ("https", "host", 443, "/api")),
        ("https://host/api/", ("https", "host", 443, "/api")),
        ("http://host", ("http", "host", 80, "")),
        ("http://[::1]:8001/v1", ("http", "::1", 8001, "")),
        ("http://10.0.0.1:1/v1", ("http", "10.0.0.1", 1, "")),
        ("https://gw.example/v1/account/openai", ("https", "gw.example", 443, "/v1/account/openai")),
        ("http://vllm_0.svc.cluster.local.:8000/v1", ("http", "vllm_0.svc.cluster.local.", 8000, "")),
    ],
)
def test_understood(url: str, parts: tuple[str, str, int, str]) -> None:
    endpoint = parse_base_url(url)
    assert (endpoint.scheme, endpoint.host, endpoint.port, endpoint.root) == parts
    assert endpoint.base_url == url


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8001", "localhost", "//localhost", "ftp://localhost", "http:/localhost", "http://", "http:///v1",
        "http://:8001", "http://localhost:", "http://localhost:0", "http://localhost:65536", "http://localhost:x",
        "http://localhost:-1", "http://user@localhost", "http://localhost/v1?", "http://localhost/v1?a=b",
        "http://localhost/v1#a", "http://local host", " http://localhost", "http://localhost\n", "http://localhost\\v1",
        "http://[::1", "http://[localhost]", "http://[fe80::1%25eth0]", "http://::1", "http://127.1", "http://256.0.0.1",
        "http://0x7f000001", "http://2130706433", "http://localhost/a/../v1", "http://localhost//v1", "http://localhost/a//v1",
        "http://localhost/%2e%2e/v1", "http://localhost/a%2fb", "http://höst", "http://${HOST}:8001", "http://-a", "http://a..b",
        "http://localhost/v1/chat/completions", "http://localhost:8001/v1/models/", "http+unix://x",
    ],
)  # fmt: skip
def test_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_base_url(url)
    assert caught.value.code == "invalid_base_url"
    assert caught.value.remedy


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_base_url("http://user:hunter22@localhost/v1")
    assert "hunter22" not in str(caught.value)
    assert "api_key" in caught.value.remedy


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "::",
        "::ffff:127.0.0.1",
        "0:0:0:0:0:0:0:1",
    ],
)
def test_one_machine_has_many_names(host: str) -> None:
    assert canonical_host(host) == canonical_host("127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.2", "example", "10.0.0.1", "::2"])
def test_others_stay_apart(host: str) -> None:
    assert canonical_host(host) == host


@pytest.mark.parametrize(
    ("host", "reached"),
    [(None, "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::", "::1"), ("::1", "::1"),
     ("[::1]", "::1"), ("10.0.0.1", "10.0.0.1"), ("node-1", "node-1")],
)  # fmt: skip
def test_the_address_behind_host_and_port(host: str | None, reached: str) -> None:
    endpoint = local_endpoint(host, 8001)
    assert (endpoint.host, endpoint.port, endpoint.root) == (reached, 8001, "")
