"""The status page's files: where they are, for whom, and what a browser is told about them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

import fluidmcp_proxy.gateway
from fluidmcp_proxy import Gateway, GatewayMiddleware
from tests.gateway.conftest import remote
from tests.gateway.test_keys import KEYS, configured

STATIC = Path(fluidmcp_proxy.gateway.__file__).parent / "static"
FILES = {"/": "page.html", "/static/page.css": "page.css", "/static/page.js": "page.js"}


def test_the_files_are_all_there_is() -> None:
    assert {path.name for path in STATIC.iterdir()} == set(FILES.values())


@pytest.mark.parametrize("path", FILES)
def test_without_a_key(upstream: int, path: str) -> None:
    with TestClient(Gateway(configured(upstream, KEYS))) as client:
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.content == (STATIC / FILES[path]).read_bytes()
        assert client.head(path).headers["content-length"] == str(len(answer.content))
        refused = client.post(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_media_types(upstream: int) -> None:
    with TestClient(remote(upstream)) as client:
        types = [client.get(path).headers["content-type"] for path in FILES]
    assert types == [f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript")]


@pytest.mark.parametrize("path", ["/static", "/static/", "/static/page.html", "/static/x", "/static/..%2fpages.py"])
def test_nothing_else_is_served(upstream: int, path: str) -> None:
    with TestClient(remote(upstream)) as client:
        assert client.get(path).status_code in (400, 404)


def test_nothing_is_from_elsewhere_and_no_data_becomes_markup() -> None:
    for path in STATIC.iterdir():
        text = path.read_text()
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^'\s]*", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"(?:src|href|action|url|fetch)\s*[=(]\s*[\"'`]/", text), "an absolute path"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\bon\w+=|style=", text)


def test_below_a_mount_point(upstream: int) -> None:
    gateway = remote(upstream)
    with TestClient(Starlette(routes=[Mount("/llm", app=gateway)], lifespan=gateway.lifespan)) as client:
        answer = client.get("/llm")
        assert str(answer.url).endswith("/llm/")
        assert answer.text == (STATIC / "page.html").read_text()
        assert client.get("/llm/static/page.js").status_code == 200


def host() -> Starlette:
    return Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("the host's"))])


def test_behind_a_prefix(upstream: int) -> None:
    with TestClient(GatewayMiddleware(host(), remote(upstream).config, prefix="/a/l m")) as client:
        answer = client.get("/a/l%20m", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "./l%20m/")
        assert client.get("/a/l%20m").text == (STATIC / "page.html").read_text()
        assert client.get("/").text == "the host's"


def test_a_middleware_without_prefix_leaves_the_root_to_the_host(upstream: int) -> None:
    with TestClient(GatewayMiddleware(host(), remote(upstream).config)) as client:
        for path in ("/", "/static/page.js", "/models"):
            assert client.get(path).text == "the host's"
