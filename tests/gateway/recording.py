"""A model's server that writes down what reaches it, judged by a parser that is not the gateway's own."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import NamedTuple

import h11

PROBES = (b"/v1/models", b"/v1/probe")
"""Targets that are not written down: the gateway's own probe and the test's."""


class Recorded(NamedTuple):
    """A request as it arrived."""

    method: bytes
    target: bytes
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Recorder(socketserver.ThreadingTCPServer):
    """``requests`` are those that arrived whole, ``nonsense`` what was no HTTP/1.1."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.requests: list[Recorded] = []
        self.nonsense: list[str] = []

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port

    def take(self) -> list[Recorded]:
        """The requests since the last time; an assertion error if anything else arrived."""
        assert not self.nonsense
        requests, self.requests = self.requests, []
        return requests


class _Connection(socketserver.BaseRequestHandler):
    server: Recorder
    request: socket.socket

    def handle(self) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1024 * 1024)
        with contextlib.suppress(OSError):
            while self._serve_one(connection):
                connection.start_next_cycle()

    def _serve_one(self, connection: h11.Connection) -> bool:
        head: h11.Request | None = None
        body = b""
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                if not connection.trailing_data[1]:  # it did not merely break off
                    self.server.nonsense.append(str(error))
                return False
            if event is h11.NEED_DATA:
                connection.receive_data(self.request.recv(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                if head.target not in PROBES:
                    self.server.requests.append(Recorded(head.method, head.target, body, tuple(head.headers)))
                return self._answer(connection)
            else:
                return False

    def _answer(self, connection: h11.Connection) -> bool:
        answer = connection.send(h11.Response(status_code=200, headers=[("content-length", "2")]))
        answer = (answer or b"") + (connection.send(h11.Data(b"ok")) or b"")
        connection.send(h11.EndOfMessage())
        self.request.sendall(answer)
        return connection.our_state is h11.DONE


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder that runs in a thread."""
    with Recorder() as recorder:
        thread = threading.Thread(target=recorder.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield recorder
        finally:
            recorder.shutdown()
            thread.join()
