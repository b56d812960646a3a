"""Malformed requests over raw sockets, under every server and parser, before a model's server that writes down."""

from __future__ import annotations

import contextlib
import importlib.util
import select
import socket
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
import uvicorn.config

from tests.gateway.conftest import remote
from tests.gateway.corpus import CORPUS, REFUSED, Case
from tests.gateway.recording import Recorded, Recorder, recording
from tests.serving import DEADLINE, eventually, serving

SERVERS = ["uvicorn-run", "uvicorn-httptools", "uvicorn-h11", "uvicorn-zttp", "hypercorn"]


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@pytest.fixture(scope="module", params=SERVERS)
def port(request: pytest.FixtureRequest, recorder: Recorder) -> Iterator[int]:
    server: str = request.param
    if server == "uvicorn-zttp" and not ("zttp" in uvicorn.config.HTTP_PROTOCOLS and importlib.util.find_spec("zttp")):
        pytest.skip("this uvicorn has no zttp, or it is not installed")
    with serving(remote(recorder.port), server) as port:
        yield port


def ask(port: int, target: str) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read()
    finally:
        connection.close()


def is_idle(port: int) -> bool:
    """Whether no request is inside; whoever was sent before this question has been let in by now."""
    ask(port, "/m/v1/probe")
    return b'"in_flight":0' in ask(port, "/models/m")


def received(connection: socket.socket, port: int) -> bytes:
    """What the server says until it closes, or has nothing to say and nothing to do."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        idle = 0
        while idle < 2:
            if not select.select([connection], [], [], 0)[0]:
                idle += is_idle(port)
            elif piece := connection.recv(65536):
                data += piece
            else:
                break
    return data


@pytest.mark.parametrize("name", CORPUS)
def test_what_reaches_the_models_server(port: int, recorder: Recorder, name: str) -> None:
    case: Case = CORPUS[name]
    recorder.take()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(case.sent)
        answer = received(connection, port)
    eventually(lambda: is_idle(port), "nothing is under way")
    requests = recorder.take()
    arrived = tuple((request.method, request.target, request.body) for request in requests)
    print(name, "->", arrived, answer[:100])
    assert arrived in case.outcomes
    if arrived == REFUSED:
        # hypercorn answers unknown codings with 501, and HTTP/2 with HTTP/2.
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501", b"\0\0")), answer
    for request in requests:
        check_headers(recorder, request)


def check_headers(recorder: Recorder, request: Recorded) -> None:
    """One host, which is the server's own; one way to tell the length; nothing that came by a trick."""
    names = [name for name, _ in request.headers]
    hosts = [value for name, value in request.headers if name in (b"host", b"x-forwarded-host")]
    assert hosts == [b"127.0.0.1:%d" % recorder.port, b"x"]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert not {b"x-t-a", b"connection", b"upgrade", b"trailer", b"te"} & set(names)
