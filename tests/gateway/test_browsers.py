"""Pages of other sites: the Host and Origin of their requests, and what CORS lets them read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway, create_app
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.errors import HostNotAllowed, OriginNotAllowed
from fluidmcp_proxy.gateway.access import ServedBy, Sources, sources_of
from tests.gateway.test_websocket import dial, refused
from tests.serving import DEADLINE, raw_exchange, serving

KEY = "kanarie-0123456789abcdef"
SITE = "https://chat.example.com"


def configured(port: int, served_by: ServedBy = ServedBy.HOST_APP, **settings: Any) -> Gateway:
    models = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}}}
    config = parse_config({"llmModels": models, "gateway": settings}, environ={})
    return Gateway(config, served_by=served_by)


def sources(served_by: ServedBy = ServedBy.COMMAND_LINE, **settings: Any) -> Sources | None:
    return sources_of(configured(1, **settings).config.settings, served_by)


def passes(checked: Sources | None, host: str | None, *origins: str) -> str:
    """``ok``, or what refuses the request."""
    headers = [(b"origin", origin.encode()) for origin in origins]
    try:
        if checked is not None:
            checked.check(None if host is None else host.encode(), headers)
    except (HostNotAllowed, OriginNotAllowed) as error:
        return error.code
    return "ok"


# Host

LOOPBACK = (
    "localhost",
    "LOCALHOST:8099",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.200.3.4:80",
    "[::1]",
    "[::1]:9",
)
FOREIGN = (
    "evil.example", "evil.example:8099", "localhost.evil.example", "127.0.0.1.evil.example", "evil.localhost",
    "0.0.0.0", "0.0.0.0:8099", "192.168.1.5", "[::]", "[::2]:80", "127.1", "2130706433", "xlocalhost",
)  # fmt: skip


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_bound_to_loopback_only_loopback_is_answered(bound: str) -> None:
    checked = sources(host=bound)
    assert {passes(checked, host) for host in LOOPBACK} == {"ok"}
    assert {passes(checked, host) for host in (*FOREIGN, None)} == {"host_not_allowed"}


@pytest.mark.parametrize(
    ("served_by", "bound"),
    [
        (ServedBy.COMMAND_LINE, "0.0.0.0"),
        (ServedBy.COMMAND_LINE, "192.168.1.5"),
        (ServedBy.ASGI_SERVER, "127.0.0.1"),
        (ServedBy.HOST_APP, "127.0.0.1"),
    ],
)
def test_the_host_is_left_to_others(served_by: ServedBy, bound: str) -> None:
    checked = sources(served_by, host=bound)
    assert {passes(checked, host) for host in (*LOOPBACK, *FOREIGN, None)} == {"ok"}


@pytest.mark.parametrize("served_by", list(ServedBy))
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_allowed_hosts_are_asked_for_everywhere(served_by: ServedBy, bound: str) -> None:
    checked = sources(served_by, host=bound, allowed_hosts=["LLM.example.com", "*.intern", "10.0.0.1", "[::2]"])
    named = ("llm.example.com", "LLM.EXAMPLE.COM.:80", "a.intern", "b.a.intern:1", "10.0.0.1:8", "[::2]:80")
    others = ("example.com", "x.llm.example.com", "intern", "xintern", "10.0.0.10", "[::3]", None)
    assert {passes(checked, host) for host in (*LOOPBACK, *named)} == {"ok"}
    assert {passes(checked, host) for host in others} == {"host_not_allowed"}


def test_any_host() -> None:
    checked = sources(allowed_hosts=["*"])
    assert {passes(checked, host) for host in (*FOREIGN, None)} == {"ok"}


# Origin


@pytest.mark.parametrize("served_by", [ServedBy.COMMAND_LINE, ServedBy.ASGI_SERVER])
def test_only_the_pages_of_the_gateway_itself(served_by: ServedBy) -> None:
    checked = sources(served_by, allowed_hosts=["*"])
    own: list[tuple[str | None, str]] = [
        ("localhost:8099", "http://localhost:8099"),
        ("LOCALHOST:8099", "http://localhost:8099"),
        ("llm.example.com", "https://llm.example.com"),
        ("llm.example.com:443", "https://llm.example.com"),
        ("llm.example.com:80", "http://llm.example.com"),
        ("[::1]:8099", "http://[::1]:8099"),
    ]
    for host, origin in own:
        assert passes(checked, host, origin) == "ok", origin
    foreign: list[tuple[str | None, str]] = [
        ("localhost:8099", "http://localhost:3000"),
        ("localhost:8099", "http://localhost"),
        ("localhost:8099", "http://127.0.0.1:8099"),
        ("localhost", "https://evil.example"),
        ("localhost:443", "http://localhost"),
        ("localhost", "null"),
        ("localhost", ""),
        ("localhost", "localhost"),
        ("localhost", "http://localhost/"),
        ("localhost", "http://localhost@evil.example"),
        (None, "http://localhost"),
    ]
    for host, origin in foreign:
        assert passes(checked, host, origin) == "origin_not_allowed", origin
    assert passes(checked, "localhost") == "ok"
    assert passes(checked, "localhost", "http://localhost", SITE) == "origin_not_allowed"


@pytest.mark.parametrize("served_by", list(ServedBy))
def test_allowed_origins_are_asked_for_everywhere(served_by: ServedBy) -> None:
    checked = sources(served_by, allowed_origins=[SITE, "http://localhost:3000"], allowed_hosts=["*"])
    assert {passes(checked, "a", origin) for origin in (SITE, "http://localhost:3000", "http://a")} == {"ok"}
    for origin in ("http://chat.example.com", f"{SITE}:444", "https://x.chat.example.com", "null"):
        assert passes(checked, "a", origin) == "origin_not_allowed", origin


def test_any_origin() -> None:
    assert passes(sources(allowed_origins=["*"]), "localhost", "null") == "ok"


def test_a_mounted_gateway_leaves_both_to_its_host() -> None:
    assert sources(ServedBy.HOST_APP) is None


# Whole requests


def test_refused_before_anything_is_told(upstream: int) -> None:
    """Also without a key where one is needed: a page learns neither from the answer nor from its status."""
    with TestClient(configured(upstream, ServedBy.COMMAND_LINE, api_keys=[KEY])) as client:
        for path in ("/health", "/m/v1/models", "/nobody/v1/models"):
            answer = client.get(path)  # to "testserver"
            assert (answer.status_code, answer.json()["error"]["code"]) == (421, "host_not_allowed")
            answer = client.post(path, headers={"host": "localhost", "origin": SITE})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert answer.headers["x-request-id"]


def test_the_environments_gateway_looks_at_the_origin(
    upstream: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"llmModels": {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}}}))
    monkeypatch.setenv("FLUIDMCP_CONFIG", str(file))
    with TestClient(create_app()) as client:
        assert client.get("/m/v1/models").status_code == 200
        assert client.get("/m/v1/models", headers={"origin": SITE}).status_code == 403
    with TestClient(create_app(file)) as client:
        assert client.get("/m/v1/models", headers={"origin": SITE}).status_code == 200


def test_websockets(upstream: int) -> None:
    """Which no browser asks about first: the Origin is all that tells a page of another site."""
    with serving(configured(upstream, ServedBy.COMMAND_LINE)) as port:
        for headers, status in (({"Origin": SITE}, 403), ({"Host": "evil.example"}, 421)):
            answer = httpx.get(f"http://127.0.0.1:{port}/m/v1/echo", headers=headers, trust_env=False, timeout=DEADLINE)
            assert answer.status_code == status
        assert refused(port, "/m/v1/realtime", {"Origin": SITE})[0] == 403
        with dial(port, "/m/v1/realtime", {"Origin": f"http://127.0.0.1:{port}"}) as client:
            client.send("x")
            assert client.recv(timeout=DEADLINE) == "x"


# CORS


@pytest.fixture(scope="module")
def open_to_a_site(upstream: int, server: str) -> Iterator[int]:
    with serving(configured(upstream, allowed_origins=[SITE], api_keys=[KEY]), server) as port:
        yield port


def ask(port: int, *lines: str, first: str = "GET /m/v1/echo HTTP/1.1") -> tuple[int, list[tuple[str, str]], bytes]:
    """A raw request; status, headers and body of the answer."""
    head = "\r\n".join([first, f"Host: 127.0.0.1:{port}", "Connection: close", *lines, "", ""])
    answer, _ = raw_exchange(port, head.encode())
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = top.decode("latin-1").split("\r\n")
    pairs = [field.split(": ", 1) if ": " in field else [field.rstrip(":"), ""] for field in fields]
    return int(status.split()[1]), [(name.lower(), value) for name, value in pairs], body


def told(headers: list[tuple[str, str]]) -> dict[str, str]:
    cors = [(name, value) for name, value in headers if name.startswith("access-control-")]
    assert len(cors) == len(dict(cors)), "each once"
    return dict(cors)


FROM_THE_SITE = f"Origin: {SITE}"
ALLOWED = {"access-control-allow-origin": SITE, "access-control-expose-headers": "*"}


def test_a_preflight(open_to_a_site: int) -> None:
    """It carries no key and needs none; nothing is done for it."""
    asked = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type")
    for path in ("/m/v1/chat/completions", "/v1/chat/completions", "/nobody/v1/x", "/health"):
        status, headers, body = ask(open_to_a_site, FROM_THE_SITE, *asked, first=f"OPTIONS {path} HTTP/1.1")
        assert (status, body) == (200, b"")
        assert told(headers) == {
            **ALLOWED,
            "access-control-allow-methods": "POST",
            "access-control-allow-headers": "authorization,content-type",
            "access-control-max-age": "600",
        }
        assert "origin" in ",".join(value for name, value in headers if name == "vary")
        assert dict(headers)["x-request-id"]


def test_a_preflight_of_another_site(open_to_a_site: int) -> None:
    asked = ("Origin: https://evil.example", "Access-Control-Request-Method: POST")
    status, headers, body = ask(open_to_a_site, *asked, first="OPTIONS /m/v1/x HTTP/1.1")
    assert (status, json.loads(body)["error"]["code"]) == (403, "origin_not_allowed")
    assert told(headers) == {}
    assert ("vary", "origin") in headers


def test_an_options_request_that_is_no_preflight(open_to_a_site: int) -> None:
    assert ask(open_to_a_site, FROM_THE_SITE, first="OPTIONS /m/v1/echo HTTP/1.1")[0] == 401
    asked = "Access-Control-Request-Method: POST"
    assert ask(open_to_a_site, asked, first="OPTIONS /m/v1/echo HTTP/1.1")[0] == 401
    assert ask(open_to_a_site, FROM_THE_SITE, asked, first="GET /m/v1/echo HTTP/1.1")[0] == 401


def test_the_site_may_read_every_answer(open_to_a_site: int) -> None:
    key = f"Authorization: Bearer {KEY}"
    for lines, first, expected in (
        ((key,), "GET /m/v1/echo HTTP/1.1", 200),
        ((key,), "GET /health HTTP/1.1", 200),
        ((key,), "GET /nobody/v1/x HTTP/1.1", 404),
        ((), "GET /m/v1/echo HTTP/1.1", 401),
        ((key,), "GET /m/v1/../x HTTP/1.1", 400),
    ):
        status, headers, _ = ask(open_to_a_site, FROM_THE_SITE, *lines, first=first)
        assert (status, told(headers)) == (expected, ALLOWED)
        assert ("vary", "origin") in headers


def test_the_servers_opinion_gives_way(open_to_a_site: int) -> None:
    """vLLM says ``access-control-allow-origin: *`` unless told otherwise; two of these and a browser takes none."""
    lines = [f"Authorization: Bearer {KEY}"]
    lines += ["x-stub-response-header: Access-Control-Allow-Origin: *", "x-stub-response-header: Vary: Accept"]
    lines += ["x-stub-response-header: Access-Control-Allow-Credentials: true", "x-stub-response-header: X-Own: 1"]
    _, headers, _ = ask(open_to_a_site, FROM_THE_SITE, *lines)
    assert told(headers) == ALLOWED
    assert {("vary", "Accept"), ("vary", "origin"), ("x-own", "1")} <= set(headers)
    _, headers, _ = ask(open_to_a_site, *lines)
    assert told(headers) == {}
    assert ("vary", "origin") in headers


def test_a_cut_answer_is_still_visibly_cut(open_to_a_site: int) -> None:
    lines = (FROM_THE_SITE, f"Authorization: Bearer {KEY}", "Content-Type: application/json")
    body = json.dumps({"model": "m", "messages": [], "stream": True, "stub": {"cut-after": 2}})
    length = f"Content-Length: {len(body)}"
    first = "POST /m/v1/chat/completions HTTP/1.1"
    head = "\r\n".join([first, f"Host: 127.0.0.1:{open_to_a_site}", length, *lines, "", body])
    answer, _ = raw_exchange(open_to_a_site, head.encode())
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"upstream_disconnected") == 1
    assert b"[DONE]" not in answer
    assert not answer.endswith(b"0\r\n\r\n")


def test_without_allowed_origins_nothing_is_said(upstream: int) -> None:
    with TestClient(configured(upstream)) as client:
        answer = client.get("/m/v1/echo", headers={"origin": SITE})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]
        asked = {"origin": SITE, "access-control-request-method": "POST"}
        assert client.options("/m/v1/echo", headers=asked).json()["method"] == "OPTIONS"
