"""A real nginx with examples/deploy/nginx.conf before a real gateway: what the gateway promises comes through it."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pytest
import trustme
from websockets.sync.client import connect

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.cli.run import _KEEP_ALIVE
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.settings import GatewaySection
from tests.serving import DEADLINE, STUB, answers, eventually, free_port, listens, serving, stub

TEXT = (STUB.parent / "deploy" / "nginx.conf").read_text()
NAME = "llm.example.com"
KEY = "0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
STREAM = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "a"}]}


class Site(NamedTuple):
    """nginx, as its clients see it, and the model's server behind the gateway."""

    port: int
    trust: ssl.SSLContext
    server: int

    @contextmanager
    def ask(self, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """The answer's head, with the rest still to be read; in the end the client leaves."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=DEADLINE, context=self.trust)
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        try:
            connection.request(method, path, data, {**HEADERS, "host": NAME, **headers})
            yield connection.getresponse()
        finally:
            connection.close()

    def stats(self) -> Any:
        with urlopen(f"http://127.0.0.1:{self.server}/stub/stats", timeout=DEADLINE) as answer:
            return json.load(answer)


def program() -> str:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    return nginx


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    nginx = program()
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("nginx")
    certificate = authority.issue_cert(NAME, "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "chain.pem", append=True)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with stub() as server:
        models = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{server}/v1"}}}
        settings = {"api_keys": [KEY], "allowed_hosts": [NAME]}
        config = parse_config({"llmModels": models, "gateway": settings}, environ={})
        with serving(Gateway(config), "uvicorn-run") as gateway, running(nginx, folder, gateway) as port:
            eventually(lambda: answers(gateway, "/ready"), "ready")
            yield Site(port, trust, server)


@contextmanager
def running(nginx: str, folder: Path, gateway: int) -> Iterator[int]:
    """nginx with the example's configuration, in the foreground below this process; yields its port."""
    port = free_port()
    site = re.sub(r"listen \[::\]:443 ssl;", "", TEXT).replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    site = site.replace("127.0.0.1:8099", f"127.0.0.1:{gateway}")
    site = re.sub(r"/etc/ssl/\S+\.pem", str(folder / "chain.pem"), site)
    site = re.sub(r"/etc/ssl/\S+\.key", str(folder / "key.pem"), site)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;"
        f"events {{}} http {{ access_log off; {temporary} {site} }}"
    )
    command = [nginx, "-p", str(folder), "-e", f"{folder}/error.log", "-c", str(configuration)]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    assert "warn" not in tested.stderr
    process = subprocess.Popen(command)
    try:
        eventually(lambda: process.poll() is not None or listens(port), "nginx listens")
        assert process.poll() is None, (folder / "error.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(DEADLINE)


def event(answer: http.client.HTTPResponse) -> bytes:
    """The next event of a stream."""
    line = answer.readline()
    assert answer.readline() == b"\n"
    return line


def test_events_come_one_by_one(site: Site) -> None:
    with site.ask("/m/v1/chat/completions", STREAM | {"stub": {"hang-after": 3}}) as answer:
        assert answer.status == 200
        for _ in range(3):
            assert event(answer).startswith(b"data: {")
        assert site.stats()["running"] == 1, "they came while the answer was still being made"
    eventually(lambda: site.stats()["running"] == 0, "aborted")


def test_a_client_that_leaves_in_the_answer_aborts_its_request(site: Site) -> None:
    before = site.stats()["aborted"]
    with site.ask("/m/v1/chat/completions", STREAM | {"stub": {"hang-after": 1}}) as answer:
        event(answer)
    eventually(lambda: site.stats()["aborted"] == before + 1, "aborted")


def test_a_client_that_leaves_before_the_answer_aborts_its_request(site: Site) -> None:
    before = site.stats()["aborted"]
    connection = http.client.HTTPSConnection("127.0.0.1", site.port, timeout=DEADLINE, context=site.trust)
    body = json.dumps(STREAM | {"stub": {"hang": True}})
    connection.request("POST", "/m/v1/chat/completions", body, {**HEADERS, "host": NAME})
    eventually(lambda: site.stats()["running"] == 1, "at the model's server")
    connection.close()
    eventually(lambda: site.stats()["aborted"] == before + 1, "aborted")


def test_an_answer_that_breaks_off_does_not_look_finished(site: Site) -> None:
    with site.ask("/m/v1/chat/completions", STREAM | {"stub": {"cut-after": 700}}) as answer:
        with pytest.raises(http.client.IncompleteRead) as broken:
            answer.read()
        assert b"upstream_disconnected" in broken.value.partial
        assert b"[DONE]" not in broken.value.partial


def test_targets_cross_as_they_are(site: Site) -> None:
    target = "/m/v1/echo/a%20b;c=%7E?q=%2F&&x"
    with site.ask(target) as answer:
        assert json.load(answer)["target"] == target.removeprefix("/m")


def test_large_bodies_cross(site: Site) -> None:
    body = {"model": "m", "prompt": "x" * 3_000_000}
    with site.ask("/m/v1/echo", body) as answer:
        told = json.load(answer)
    assert told["body"]["sha256"] == hashlib.sha256(json.dumps(body).encode()).hexdigest()


def test_websockets_cross(site: Site) -> None:
    through = socket.create_connection(("127.0.0.1", site.port), timeout=DEADLINE)
    headers = {"authorization": HEADERS["authorization"]}
    with connect(f"wss://{NAME}/m/v1/realtime", sock=through, ssl=site.trust, additional_headers=headers) as session:
        session.send("hello")
        assert session.recv(DEADLINE) == "hello"


def test_another_hosts_name_is_refused_by_the_gateway(site: Site) -> None:
    with site.ask("/m/v1/models", host="elsewhere.example.com") as answer:
        assert answer.status == 421


def test_the_location_in_the_documentation(tmp_path: Path) -> None:
    page = (STUB.parent.parent / "docs" / "embedding.md").read_text()
    (location,) = re.findall(r"^```nginx\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    configuration = tmp_path / "nginx.conf"
    server = f"server {{ listen 127.0.0.1:{free_port()}; {location} }}"
    configuration.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {server} }}")
    command = [program(), "-t", "-p", str(tmp_path), "-e", f"{tmp_path}/error.log", "-c", str(configuration)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_sizes_and_times_fit_the_gateways() -> None:
    megabytes = re.search(r"client_max_body_size (\d+)m;", TEXT)
    idle = re.search(r"keepalive_timeout (\d+)s;", TEXT)
    silence = re.search(r"proxy_read_timeout (\d+)h;", TEXT)
    assert megabytes is not None
    assert idle is not None
    assert silence is not None
    assert int(megabytes[1]) * 1024 * 1024 == GatewaySection.model_fields["max_body_bytes"].default
    assert int(idle[1]) < _KEEP_ALIVE
    assert int(silence[1]) * 3600 >= 900 + 600
