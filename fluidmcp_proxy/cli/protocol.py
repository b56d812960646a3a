"""uvicorn's HTTP protocol for ``fluidmcp run``: limits on what it waits for, and less work for a request.

The head of a request has to come in time and may not be large: uvicorn would wait, and collect, for ever. What follows
for a request is in ``cycle``.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fluidmcp_proxy.cli.cycle import Cycle, writer_of
from fluidmcp_proxy.cli.deadline import Deadline
from fluidmcp_proxy.errors import GatewayError, HeadersTooLarge, InvalidTarget, RequestTimeout
from fluidmcp_proxy.upstream.headers import pick_request_id

__all__ = ["GatewayProtocol"]


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's, with limits, and with requests of our own kind.

    A connection on which nobody waits for an answer is closed ``head_timeout`` seconds after it was opened, or after
    the first byte of what should become the next request, unless a head is complete by then. More than ``max_head``
    bytes that are no content end it, too: of a head, of trailers, of chunk extensions. Between requests it is
    uvicorn's keep-alive that counts, inside a body the gateway's own ``body_timeout``. At most ``max_pipelined``
    requests may wait behind one that is being answered.
    """

    head_timeout = 60.0
    max_head = 128 * 1024
    max_pipelined = 16

    # uvicorn's, with its own kind of request in them.
    cycle: Any
    parser: Any
    pipeline: Any
    scope: Any

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self._deadline = Deadline(self.loop, self._too_late)
        self._awaits_head = True
        self._barren = 0
        self._is_websocket = False
        self._overtaken: list[Cycle] = []

    # The event loop's side.

    def connection_made(self, transport: Any) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self._deadline.set(self.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._deadline.cancel()
        self.connections.discard(self)
        for cycle in (*self._overtaken, self.cycle):
            if cycle is not None:
                cycle.disconnect()
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
        self.parser = None  # it refers to this object

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._barren += len(data)
        super().data_received(data)
        if self._barren > self.max_head:
            self._refuse(HeadersTooLarge(f"More than {self.max_head} bytes came without content."))
        elif not self._awaits_head and self._waits_for_a_head():
            self._awaits_head = True
            self._deadline.set(self.head_timeout)

    # The parser's side.

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._barren = 0
        scope, parser = self.scope, self.parser
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version = parser.get_http_version()
        upgrades = parser.should_upgrade()
        self._deadline.lift()
        self._awaits_head = False
        self._is_websocket = upgrades and self._should_upgrade()
        if self._is_websocket:
            return
        if not upgrades:
            self.headers = []  # trailers would be added, perhaps before the app has run (RFC 9110 §6.5.1)
        scope["path"], scope["raw_path"], scope["query_string"] = _target(self.url, self.root_path)
        # Whatever follows an upgrade that is refused the parser takes for the other protocol.
        lasts = version != "1.0" and not upgrades and parser.should_keep_alive()
        scope["extensions"] = {"fluidmcp.write": writer_of}
        last = self.cycle
        cycle: Any = Cycle(self, scope, keep_alive=lasts, expects_continue=self.expect_100_continue)
        self.cycle = cycle
        if last is None or last.response_complete:
            self._start_asgi_task(cycle, self.app)
            return
        self.flow.pause_reading()
        self.pipeline.appendleft((cycle, self.app))
        self._overtaken = [cycle for cycle in (*self._overtaken, last) if not cycle.response_complete]
        if len(self.pipeline) > self.max_pipelined:
            raise ValueError("too many requests at once")  # the parser stops, and calls it nonsense

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._barren = 0
        cycle = self.cycle
        if cycle is not None and not (self._is_websocket or cycle.response_complete):
            cycle.feed(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._barren = 0
        cycle = self.cycle
        if cycle is not None and not (self._is_websocket or cycle.response_complete):
            cycle.more_body = False
            cycle.tell()

    def on_response_complete(self) -> None:
        """Called by a request that was answered."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._deadline.set(self.timeout_keep_alive)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP/1.1; called by uvicorn."""
        self._refuse(InvalidTarget("The request is not well-formed HTTP/1.1."))

    # Ours.

    def _waits_for_a_head(self) -> bool:
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        return not self.transport.is_closing() and self.transport.get_protocol() is self  # else it is a WebSocket's

    def _too_late(self) -> None:
        if self._barren:
            self._refuse(RequestTimeout(f"The head of the request did not come within {self.head_timeout:g} s."))
        else:
            self.transport.close()

    def _refuse(self, error: GatewayError) -> None:
        """Answer with ``error`` and close; an answer that has begun to an earlier request is aborted instead."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self.transport.abort()
            return
        body = error.body()
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", pick_request_id(())),
        ]
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        phrase = HTTPStatus(error.status).phrase.encode()
        self.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (error.status, phrase, head, body))
        self.transport.close()


def _target(url: bytes, root_path: str) -> tuple[str, bytes, bytes]:
    """Path, raw path and query of a request target, as a scope has them."""
    if url.startswith(b"/") and b"#" not in url:
        raw, _, query = url.partition(b"?")
    else:
        parsed = httptools_impl.httptools.parse_url(url)  # type: ignore[attr-defined]  # as uvicorn does
        raw, query = parsed.path, parsed.query or b""
    path = raw.decode("ascii")
    return root_path + (unquote(path) if "%" in path else path), root_path.encode("ascii") + raw, query
