"""A model's server that speaks nonsense or breaks off anywhere, seen by a client's raw socket, under every server."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.gateway.conftest import remote
from tests.gateway.test_truncation import LAST_CHUNK, raw, unchunked
from tests.serving import DEADLINE, serving
from tests.upstream.test_answers import NONSENSE

EVENTS = [b'data: {"n": %d}\n\n' % number for number in range(3)]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
STREAMS = {
    "chunked": HEAD
    + b"transfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for event in EVENTS for piece in (event[:5], event[5:]))
    + b"0\r\n\r\n",
    "length": HEAD + b"content-length: %d\r\n\r\n" % sum(map(len, EVENTS)) + b"".join(EVENTS),
}


def code_of(body: bytes) -> str:
    error = json.loads(body if body.startswith(b"{") else unchunked(body))["error"]
    return str(error["code"])


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense(gateway: int, case: str) -> None:
    head, body, _ = raw(gateway, NONSENSE[case])
    if b" 502 " in head:
        assert code_of(body) in ("upstream_invalid_response", "upstream_disconnected")
    else:  # the head was good
        assert b" 200 " in head
        assert not body.endswith(LAST_CHUNK)


@pytest.mark.parametrize("framing", STREAMS)
def test_a_stream_cut_at_every_byte(gateway: int, framing: str) -> None:
    """Whole events, then one that tells, then no clean end; and the next answer is the next answer."""
    answer = STREAMS[framing]
    head_size = answer.index(b"\r\n\r\n") + 4
    for cut in range(len(answer)):
        head, body, _ = raw(gateway, answer[:cut])
        if cut < head_size:
            assert b" 502 " in head, cut
            assert code_of(body) == "upstream_disconnected"
            continue
        assert b" 200 " in head, cut
        assert not body.endswith(LAST_CHUNK), cut
        *whole, end = (unchunked(body) if framing == "chunked" else body).split(b"\n\n")
        assert end == b"", cut
        if framing == "length":  # no room for the event that tells, but the client counts
            assert len(body) < len(b"".join(EVENTS))
        else:
            assert json.loads(whole.pop().removeprefix(b"data: "))["error"]["code"] == "upstream_disconnected"
        assert [event + b"\n\n" for event in whole] == EVENTS[: len(whole)], cut
    head, body, _ = raw(gateway, answer)
    assert (unchunked(body) if framing == "chunked" else body) == b"".join(EVENTS)


class _Impatient(socketserver.BaseRequestHandler):
    """Refuses an upload as soon as it has seen its head."""

    def handle(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            data = self.request.recv(65536)
            if not data:
                return
            received += data
        self.request.sendall(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig")


@pytest.fixture(scope="module")
def impatient(server: str) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Impatient) as upstream:
        upstream.daemon_threads = True
        thread = threading.Thread(target=upstream.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        with serving(remote(upstream.server_address[1]), server) as port:
            yield port
        upstream.shutdown()
        thread.join()


@pytest.mark.parametrize("then", ["silence", "more"])
def test_a_refusal_while_the_upload_runs(impatient: int, then: str) -> None:
    with socket.create_connection(("127.0.0.1", impatient), timeout=DEADLINE) as connection:
        connection.sendall(b"POST /m/v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n" + b"x" * 100_000)
        if then == "more":
            with contextlib.suppress(OSError):
                for _ in range(100):
                    connection.sendall(b"x" * 100_000)
        received = b""
        while not received.endswith(b"big"):
            data = connection.recv(65536)
            assert data, received
            received += data
    assert received.startswith(b"HTTP/1.1 413 ")
