"""WebSockets through the gateway: messages, handshakes, every way to end, under each ASGI server that speaks them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fluidmcp_proxy import Gateway, GatewayMiddleware
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway import websocket
from tests.gateway.conftest import remote
from tests.gateway.records import Records
from tests.gateway.test_loading import launched, url, with_an_end  # noqa: F401 - the first is a fixture
from tests.serving import DEADLINE, eventually, serving, stub

Message = MutableMapping[str, Any]

UVICORN = ["uvicorn-httptools", "uvicorn-h11-wsproto"]
SERVERS = [*UVICORN, "hypercorn"]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """A server that nobody else talks to."""
    with stub() as port:
        yield port


@pytest.fixture(scope="module")
def gateway(upstream: int, server: str) -> Iterator[int]:
    with serving(remote(upstream), server) as port:
        yield port


@contextlib.contextmanager
def dial(
    port: int, path: str = "/m/v1/realtime", headers: dict[str, str] | None = None, **keys: Any
) -> Iterator[ClientConnection]:
    """A client; none of the environment's proxies, no limit and no compression unless asked for."""
    keys = {"proxy": None, "max_size": None, "compression": None, "open_timeout": DEADLINE, **keys}
    with connect(f"ws://127.0.0.1:{port}{path}", additional_headers=headers, **keys) as connection:
        yield connection


def end_of(connection: ClientConnection) -> tuple[int, str]:
    """How the other side closes, whatever it says before."""
    try:
        while True:
            connection.recv(timeout=DEADLINE)
    except ConnectionClosed as error:
        return (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, "")


def refused(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
    with pytest.raises(InvalidStatus) as caught, dial(port, path, headers):
        pass
    answer = caught.value.response
    names = {name.lower(): value for name, value in answer.headers.raw_items()}
    return answer.status_code, names, json.loads(answer.body or b"null")


def stats(port: int) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/stub/stats", trust_env=False, timeout=DEADLINE).json()
    return answer


def model(port: int) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(url(port, "/models/m"), timeout=DEADLINE).json()
    return answer


# Messages


def test_messages_both_ways(gateway: int) -> None:
    big = bytes(range(256)) * 40960  # 10 MiB
    with dial(gateway) as client:
        for message in ("hello", b"\x00\xff", "", b"", "é🎤", big, "x" * 200_000):
            client.send(message)
            assert client.recv(timeout=DEADLINE) == message


def test_order_and_bounds(gateway: int) -> None:
    with dial(gateway) as client:
        for number in range(500):
            client.send(str(number) if number % 2 else str(number).encode())
        for number in range(500):
            assert client.recv(timeout=DEADLINE) == (str(number) if number % 2 else str(number).encode())


def test_fragments_arrive_as_one_message(gateway: int) -> None:
    with dial(gateway) as client:
        client.send(iter(["a", "b", "", "c"]))
        assert client.recv(timeout=DEADLINE) == "abc"
        client.send("stub:raw 010161" + "8901" + "21" + "800162")  # "a", a ping, "b"
        assert client.recv(timeout=DEADLINE) == "ab"


def test_the_clients_pings_are_answered(gateway: int) -> None:
    with dial(gateway) as client:
        assert client.ping(b"x").wait(DEADLINE)


def test_several_at_once(gateway: int, upstream: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(gateway)) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(str(number))
        assert [client.recv(timeout=DEADLINE) for client in clients] == [str(number) for number in range(20)]
        eventually(lambda: model(gateway)["in_flight"] == 20, "all are inside, and those before have left")
    eventually(lambda: model(gateway)["in_flight"] == 0, "all leases are over")


# The handshake


def test_what_the_server_is_asked(gateway: int, upstream: int) -> None:
    headers = {"X-A": "1", "Authorization": "Bearer k", "X-Request-Id": "abc", "X_B": "2", "Proxy-Authorization": "b"}
    with dial(gateway, "/m/v1/realtime?model=m&x=%20/", headers, user_agent_header=None, origin="http://o") as client:
        client.send("stub:request")
        asked = json.loads(client.recv(timeout=DEADLINE))
        assert client.response is not None
        assert client.response.headers["x-request-id"] == "abc"
        assert "Content-Length" not in client.response.headers
    assert (asked["method"], asked["target"]) == ("GET", "/v1/realtime?model=m&x=%20/")
    received = [(name.lower(), value) for name, value in asked["headers"]]
    assert received[0] == ("host", f"127.0.0.1:{upstream}")
    names = [name for name, _ in received]
    assert len(names) == len(set(names))
    assert {**dict(received), "sec-websocket-key": "", "via": ""} == {
        "host": f"127.0.0.1:{upstream}",
        "origin": "http://o",
        "x-a": "1",
        "authorization": "Bearer k",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "http",
        "x-forwarded-host": f"127.0.0.1:{gateway}",
        "via": "",
        "x-request-id": "abc",
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-key": "",
        "sec-websocket-version": "13",
    }


def test_headers_of_the_servers_answer(gateway: int) -> None:
    with dial(gateway, headers={"x-stub-response-header": "x-b: 2"}) as client:
        assert client.response is not None
        assert client.response.headers["x-b"] == "2"


@pytest.mark.parametrize(("offered", "chosen"), [(["a", "realtime"], "realtime"), (["a"], None), (None, None)])
def test_subprotocols(gateway: int, offered: Any, chosen: str | None) -> None:
    headers = {"x-stub-response-header": "sec-websocket-protocol: realtime"} if chosen else None
    with dial(gateway, headers=headers, subprotocols=offered) as client:
        assert client.subprotocol == chosen
        client.send("stub:request")
        asked = {name.lower(): value for name, value in json.loads(client.recv(timeout=DEADLINE))["headers"]}
    assert asked.get("sec-websocket-protocol") == (", ".join(offered) if offered else None)


def test_a_subprotocol_that_was_not_offered(gateway: int) -> None:
    headers = {"x-stub-response-header": "sec-websocket-protocol: other"}
    status, names, body = refused(gateway, "/m/v1/realtime", headers)
    assert (status, body["error"]["code"]) == (502, "upstream_invalid_response")
    assert names["x-should-retry"] == "false"


def test_the_models_own_key(upstream: int) -> None:
    with serving(remote(upstream, api_key="sk-model")) as port, dial(port, headers={"Authorization": "no"}) as client:
        client.send("stub:request")
        asked = {name.lower(): value for name, value in json.loads(client.recv(timeout=DEADLINE))["headers"]}
        assert asked["authorization"] == "Bearer sk-model"


@pytest.mark.parametrize("status", [401, 403, 503])
def test_the_servers_refusal_is_passed_on(gateway: int, status: int) -> None:
    headers = {"x-stub-status": str(status), "x-stub-response-header": "x-b: 2", "x-request-id": "abc"}
    seen, names, body = refused(gateway, "/m/v1/realtime", headers)
    assert (seen, body["error"]["type"]) == (status, "StubError")
    assert (names["x-b"], names["x-request-id"], names["content-type"]) == ("2", "abc", "application/json")


def test_a_route_of_the_server_that_is_none_for_websockets(gateway: int) -> None:
    status, _, body = refused(gateway, "/m/v1/models")
    assert (status, body["object"]) == (200, "list")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nobody/v1/realtime", 404, "model_not_found"),
        ("/m/v1/", 404, "path_not_found"),
        ("/m/realtime", 404, "path_not_found"),
        ("/m/v1/sleep", 404, "path_not_found"),
        ("/m/v1/collective_rpc", 404, "path_not_found"),
        ("/m/tokenize", 405, "method_not_allowed"),
        ("/m/mcp", 410, "mcp_endpoint_removed"),
        ("/health", 404, "path_not_found"),
        ("/models/m", 404, "path_not_found"),
        ("/", 404, "path_not_found"),
        ("/m/v1/../x", 400, "invalid_path"),
        ("/m/v1/%2e%2e/x", 400, "invalid_path"),
        ("/m/v1/a%2fb", 400, "invalid_path"),
    ],
)
def test_refused_by_the_gateway(gateway: int, path: str, status: int, code: str) -> None:
    seen, names, body = refused(gateway, path, {"x-request-id": "abc"})
    assert (seen, body["error"]["code"]) == (status, code)
    assert (names["content-type"], names["x-request-id"]) == ("application/json", "abc")


def test_extra_paths_open(upstream: int) -> None:
    with serving(remote(upstream, extra_paths=["/v1/sleep", "/own/*"])) as port:
        for path in ("/m/v1/sleep", "/m/own/x"):
            assert refused(port, path)[2] == {"detail": "Not Found"}  # the server's words


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with serving(remote(closed.getsockname()[1])) as port:
            status, names, body = refused(port, "/m/v1/realtime")
    assert (status, body["error"]["code"]) == (503, "upstream_unavailable")
    assert names["retry-after"] == "2"


HOST = (b"host", b"127.0.0.1:8099")


def scope_of(headers: list[tuple[bytes, bytes]], **keys: Any) -> dict[str, Any]:
    path = "/m/v1/realtime"
    scope = {"type": "websocket", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    return {**scope, "http_version": "1.1", "scheme": "ws", "subprotocols": [], **keys}


async def handshake(gateway: Gateway, scope: dict[str, Any]) -> list[Message]:
    """What the gateway says to a client that leaves once it has an answer."""
    said: list[Message] = []
    answered = anyio.Event()
    heard = iter([{"type": "websocket.connect"}])

    async def receive() -> Message:
        for message in heard:
            return message
        await answered.wait()
        return {"type": "websocket.disconnect"}

    async def send(message: Message) -> None:
        said.append(message)
        answered.set()

    with anyio.fail_after(DEADLINE):
        await gateway(scope, receive, send)
    return said


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 400),
        ([HOST, HOST], 400),
        ([(b"host", b"a b")], 400),
        ([HOST, *[(b"x", b"")] * 200], 431),
        ([HOST, (b"x", b"x" * 70_000)], 431),
    ],
)
async def test_headers_that_are_refused(upstream: int, headers: list[tuple[bytes, bytes]], status: int) -> None:
    async with remote(upstream).run() as gateway:
        start, body = await handshake(gateway, scope_of(headers, extensions={"websocket.http.response": {}}))
        assert (start["type"], start["status"]) == ("websocket.http.response.start", status)
        assert (b"content-length", str(len(body["body"])).encode()) in start["headers"]
        assert await handshake(gateway, scope_of(headers)) == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.anyio
async def test_a_refusal_where_the_asgi_server_cannot_answer_by_http(upstream: int) -> None:
    async with remote(upstream).run() as gateway:
        scope = scope_of([HOST, (b"x-stub-status", b"403")], extensions=None)
        assert await handshake(gateway, scope) == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.anyio
@pytest.mark.parametrize(("scheme", "told"), [("ws", "http"), ("wss", "https")])
async def test_a_body_and_another_handshake_stay_here(upstream: int, scheme: str, told: str) -> None:
    """``Content-Length`` would make frames the body of a request."""
    headers = [HOST, (b"content-length", b"5"), (b"transfer-encoding", b"chunked"), (b"sec-websocket-extensions", b"x")]
    received: list[str] = []
    heard = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "stub:request"}])
    over = anyio.Event()

    async def receive() -> Message:
        for message in heard:
            return message
        await over.wait()
        return {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Message) -> None:
        if message["type"] == "websocket.send":
            received.append(message["text"])
            over.set()

    async with remote(upstream).run() as gateway:
        with anyio.fail_after(DEADLINE):
            await gateway(scope_of(headers, scheme=scheme), receive, send)
    asked = {name.lower(): value for name, value in json.loads(received[0])["headers"]}
    assert not {"content-length", "transfer-encoding", "sec-websocket-extensions"} & set(asked)
    assert asked["x-forwarded-proto"] == told


# Ends


def is_alone(upstream: int) -> None:
    """Wait until no conversation of an earlier test is left."""
    eventually(lambda: stats(upstream)["running"] == 0, "nobody else is there")


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "bye"), (1011, ""), (4321, "é" * 61)])
def test_the_client_closes(gateway: int, upstream: int, server: str, code: int, reason: str) -> None:
    is_alone(upstream)
    with dial(gateway) as client:
        client.send("x")
        client.recv(timeout=DEADLINE)
        client.close(code, reason)
    # hypercorn does not tell the app how its client has closed.
    expected = [0, ""] if server == "hypercorn" else [code, reason]
    eventually(lambda: stats(upstream)["last_close"] == expected, "the server knows")
    eventually(lambda: stats(upstream)["running"] == 0, "the server is rid of it")


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012, 3000, 4999, None])
def test_the_server_closes(gateway: int, upstream: int, server: str, code: int | None) -> None:
    is_alone(upstream)
    before = stats(upstream)["aborted"]
    with dial(gateway) as client:
        client.send("stub:close" if code is None else f"stub:close {code} so long")
        assert end_of(client) == ((1000, "") if code is None else (code, "so long"))
    eventually(lambda: stats(upstream)["running"] == 0, "the server is rid of it")
    assert stats(upstream)["aborted"] == before


def test_what_was_said_before_the_close_arrives(gateway: int) -> None:
    with dial(gateway) as client:
        client.send("stub:flood 50 100000")
        client.send("stub:close 4000")
        received = [len(client.recv(timeout=DEADLINE)) for _ in range(50)]
        assert received == [100_000] * 50
        assert end_of(client)[0] == 4000


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_the_connection_to_the_server_is_lost(gateway: int, how: str) -> None:
    with dial(gateway) as client:
        client.send("last words")
        client.send(f"stub:cut {how}")
        assert client.recv(timeout=DEADLINE) == "last words"
        code, reason = end_of(client)
    assert code == 1011
    assert reason.startswith("upstream_disconnected: ")


@pytest.mark.parametrize("nonsense", ["8300", "8101ff", "8000", "880203ee"])
def test_the_server_breaks_the_rules(gateway: int, nonsense: str) -> None:
    with dial(gateway) as client:
        client.send(f"stub:raw {nonsense}")
        code, reason = end_of(client)
    assert code == 1011
    assert reason.startswith("upstream_invalid_response: ")


def test_the_servers_process_ends(launched: Any) -> None:  # noqa: F811
    with serving(launched()) as port:
        with dial(port) as client:
            client.send("stub:cut exit")
            assert end_of(client)[0] == 1011
        eventually(lambda: model(port)["spawns"] == 2, "restarted")
        with dial(port) as client:  # waits
            client.send("again")
            assert client.recv(timeout=DEADLINE) == "again"


@contextlib.contextmanager
def asking(port: int, *headers: str) -> Iterator[None]:
    """A client that has sent its handshake; leaving the block leaves the server."""
    lines = ["GET /m/v1/realtime HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", *headers, "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
        client.sendall("\r\n".join(lines).encode())
        yield


def leave(client: ClientConnection) -> None:
    """Without a word."""
    client.socket.shutdown(socket.SHUT_RDWR)
    client.socket.close()


@pytest.mark.parametrize("doing", ["nothing", "receiving", "not reading"])
def test_the_client_leaves(gateway: int, upstream: int, doing: str) -> None:
    is_alone(upstream)
    with dial(gateway, max_queue=1) as client:
        client.send("x" if doing == "nothing" else "stub:flood 1000 1000000")
        for _ in range(20 if doing == "receiving" else 1):
            client.recv(timeout=DEADLINE)
        assert stats(upstream)["running"] == 1
        leave(client)
        eventually(lambda: stats(upstream)["running"] == 0, "the server is rid of it")
        eventually(lambda: model(gateway)["in_flight"] == 0, "the lease is over")


def test_the_client_leaves_during_the_handshake(gateway: int, upstream: int) -> None:
    is_alone(upstream)
    with asking(gateway, "X-Stub-Answer-Delay: 600"):
        eventually(lambda: stats(upstream)["running"] == 1, "it is at the server")
        eventually(lambda: model(gateway)["in_flight"] == 1, "it is inside, and nobody else")
    eventually(lambda: model(gateway)["in_flight"] == 0, "it has left")
    eventually(lambda: stats(upstream)["running"] == 0, "the server is rid of it")


@pytest.mark.parametrize(("how", "waiting"), [("leave", 0), ("leave", 2), ("close", 2)])
def test_the_client_leaves_a_server_that_does_not_read(server: str, how: str, waiting: int) -> None:
    """Whatever it has sent before waits for the server, and its leaving behind that."""
    records, servers = Records(), contextlib.ExitStack()
    gateway = remote(servers.enter_context(stub()), report=records)
    with servers, serving(gateway, server) as port, dial(port) as client:
        client.send("stub:deaf")
        client.send(b"x" * 10_000_000)
        for _ in range(waiting):
            client.send("x")
        eventually(lambda: model(port)["in_flight"] == 1, "it is inside")
        client.close_timeout = DEADLINE
        client.close(4000) if how == "close" else leave(client)
        eventually(lambda: model(port)["in_flight"] == 0, "it has left")
        assert records.next().outcome == ("complete" if how == "close" and server != "hypercorn" else "client_left")


def test_messages_that_are_too_large(upstream: int) -> None:
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}
    config = parse_config({"llmModels": {"m": entry}, "gateway": {"max_body_bytes": 1000}}, environ={})
    with serving(Gateway(config)) as port:
        for message in ("x" * 1001, b"x" * 1001, "é" * 501):
            with dial(port) as client:
                client.send("x" * 1000)
                assert client.recv(timeout=DEADLINE) == "x" * 1000
                client.send(message)
                code, reason = end_of(client)
                assert code == 1009
                assert reason.startswith("request_too_large: ")
        with dial(port) as client:
            client.send("stub:flood 1 1001")
            code, reason = end_of(client)
        assert code == 1011
        assert reason.startswith("upstream_invalid_response: ")
        eventually(lambda: model(port)["in_flight"] == 0, "the leases are over")


# Models that load and end


def test_waits_for_the_model(launched: Any) -> None:  # noqa: F811
    with serving(launched("--load-time", "0.5")) as port, dial(port) as client:
        client.send("hello")
        assert client.recv(timeout=DEADLINE) == "hello"
        assert model(port)["state"] == "ready"


def test_does_not_wait_if_it_does_not_want_to(launched: Any) -> None:  # noqa: F811
    with serving(launched("--listen-early", "--never-ready", queue_timeout=0.2)) as port:
        for headers in ({"prefer": "wait=0"}, {}):
            status, names, body = refused(port, "/m/v1/realtime", headers)
            assert (status, body["error"]["code"]) == (503, "model_starting")
            assert "retry-after" in names


def test_a_client_that_leaves_while_it_waits(launched: Any, server: str) -> None:  # noqa: F811
    with serving(launched("--listen-early", "--never-ready"), server) as port:
        with asking(port):
            eventually(lambda: model(port)["queued"] == 1, "it waits")
        eventually(lambda: model(port)["queued"] == 0, "it has left")


@pytest.mark.parametrize("server", UVICORN, indirect=True)
def test_cut_when_the_drain_is_over(launched: Any, server: str) -> None:  # noqa: F811
    gateway = launched(drain_timeout=0.2)
    with serving(with_an_end(gateway), server) as port, dial(port) as client:
        client.send("x")
        client.recv(timeout=DEADLINE)
        httpx.get(url(port, "/the-end"), timeout=DEADLINE)
        code, reason = end_of(client)
        assert code == 1012
        assert reason.startswith("shutting_down: ")
        status, _, body = refused(port, "/m/v1/realtime")
        assert (status, body["error"]["code"]) == (503, "shutting_down")


def test_goes_on_during_the_drain(launched: Any) -> None:  # noqa: F811
    gateway = launched()
    with serving(with_an_end(gateway)) as port, dial(port) as client:
        client.send("x")
        client.recv(timeout=DEADLINE)
        httpx.get(url(port, "/the-end"), timeout=DEADLINE)
        eventually(lambda: model(port)["state"] == "stopping", "it drains")
        client.send("still here")
        assert client.recv(timeout=DEADLINE) == "still here"
        client.close(1000)
        eventually(lambda: model(port)["state"] == "stopped", "it was waited for")


def test_a_silent_conversation_is_no_stall(launched: Any) -> None:  # noqa: F811
    stall_timeout = 0.2
    with serving(launched(liveness=True, stall_timeout=stall_timeout)) as port, dial(port) as client:
        client.send("x")
        client.recv(timeout=DEADLINE)
        began = time.monotonic()
        eventually(lambda: time.monotonic() > began + 4 * stall_timeout, "a stall would have been seen")
        assert model(port)["spawns"] == 1
        client.send("y")
        assert client.recv(timeout=DEADLINE) == "y"


# Flow control


def test_a_slow_client_slows_the_server(upstream: int, server: str) -> None:
    gateway = remote(upstream)
    with serving(gateway, server) as port, dial(port, max_queue=1) as client:
        assert gateway._fleet is not None
        scheduler = gateway._fleet.scheduler
        client.send("stub:flood 2000 100000")
        client.recv(timeout=DEADLINE)
        passed = until_still(lambda: scheduler.progress("m"))
        assert passed < 150_000_000
        received = 1 + sum(1 for _ in range(1999) if client.recv(timeout=DEADLINE))
        assert received == 2000
        eventually(lambda: scheduler.progress("m") == 200_000_000, "all of it is counted")


@pytest.mark.parametrize("server", UVICORN, indirect=True)
def test_a_server_that_does_not_read_slows_the_client(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a message of the largest size, 64 MiB, waits for it."""
    monkeypatch.setattr("fluidmcp_proxy.upstream.websocket._HOLD", 0.01)
    sent = 0

    def send() -> None:
        nonlocal sent
        with contextlib.suppress(ConnectionClosed):
            while True:
                client.send(b"x" * 1_000_000)
                sent += 1

    deaf = contextlib.ExitStack()
    with serving(remote(deaf.enter_context(stub())), server) as port, dial(port) as client:
        client.send("stub:deaf")
        sender = threading.Thread(target=send)
        sender.start()
        try:
            assert until_still(lambda: sent) < 200
        finally:
            deaf.close()
        # The server's death is told at once, and what still comes from the client is dropped.
        assert end_of(client)[0] == 1011
        sender.join(DEADLINE)
        assert not sender.is_alive()


def until_still(value: Any) -> int:
    """Wait until ``value()`` has been the same, and not 0, for thirty looks; that value."""
    samples: list[int] = []

    def still() -> bool:
        samples.append(value())
        return samples[-1] > 0 and len(samples) > 30 and len(set(samples[-30:])) == 1

    eventually(still, "nothing moves any more")
    return samples[-1]


# Ways in


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
def test_mounted(upstream: int, framework: Any) -> None:
    gateway = remote(upstream)
    app = framework(lifespan=gateway.lifespan)
    app.mount("/llm", gateway)
    with TestClient(app) as client:
        with client.websocket_connect("/llm/m/v1/realtime?x=1", subprotocols=["a"]) as socket:
            socket.send_text("stub:request")
            assert socket.receive_json()["target"] == "/v1/realtime?x=1"
            socket.send_bytes(b"\x00")
            assert socket.receive_bytes() == b"\x00"
            socket.send_text("stub:close 4000 bye")
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_text()
        assert (closed.value.code, closed.value.reason) == (4000, "bye")
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/llm/x/v1/realtime"):
            pass
        assert denied.value.status_code == 404
        assert denied.value.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_middleware(upstream: int, prefix: str) -> None:
    async def host(scope: Message, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket", "it has no lifespan"
        await send({"type": "websocket.close", "code": 4444})

    with TestClient(GatewayMiddleware(host, remote(upstream).config, prefix)) as client:
        with client.websocket_connect(f"{prefix}/m/v1/realtime") as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "hello"
        with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/other"):
            pass
        assert closed.value.code == 4444


def test_without_its_lifespan_it_says_so(upstream: int) -> None:
    client = TestClient(remote(upstream))
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/m/v1/realtime"):
        pass
    assert denied.value.json()["error"]["code"] == "lifespan_not_running"


# The access line


@pytest.mark.parametrize(
    ("command", "status", "size", "outcome", "code"),
    [
        ("stub:close 1000", 101, 5, "complete", "-"),
        ("stub:cut fin", 101, 5, "upstream_died", "upstream_disconnected"),
        ("close", 101, 5, "complete", "-"),
        ("leave", 101, 5, "client_left", "-"),
        ("refuse", 403, 83, "complete", "-"),
        ("nobody", 404, 0, "refused", "model_not_found"),
    ],
)
def test_the_access_line(upstream: int, command: str, status: int, size: int, outcome: str, code: str) -> None:
    headers = {"x-request-id": "abc"}
    records = Records()
    with serving(remote(upstream, report=records)) as port:
        if command == "refuse":
            refused(port, "/m/v1/realtime?key=secret", {**headers, "x-stub-status": "403"})
        elif command == "nobody":
            refused(port, "/nobody/v1/realtime?key=secret", headers)
        else:
            with dial(port, "/m/v1/realtime?key=secret", headers) as client:
                client.send("ééx")
                client.recv(timeout=DEADLINE)
                if command.startswith("stub:"):
                    client.send(command)
                    end_of(client)
                elif command == "leave":
                    leave(client)
        record = records.next()
    route, name = ("-", "-") if command == "nobody" else ("/v1/realtime", "m")
    assert record[:7] == ("abc", "WEBSOCKET", route, name, status, size, min(size, 1))
    assert (record.outcome, record.code) == (outcome, code)
    assert (record.ttfb is None) == (size == 0)


# The app's own edges


@pytest.mark.anyio
async def test_cancelled_after_any_number_of_turns(upstream: int) -> None:
    """No lease stays, and the server is rid of it."""
    async with remote(upstream).run() as gateway:
        assert gateway._fleet is not None
        scheduler = gateway._fleet.scheduler
        turns, answered = 0, 0
        while answered < 3:
            answered = 0
            heard = iter([{"type": "websocket.connect"}, *[{"type": "websocket.receive", "text": "x"}] * 3])

            async def receive() -> Message:
                for message in heard:  # noqa: B023
                    await anyio.lowlevel.checkpoint()
                    return message
                await anyio.sleep_forever()
                raise AssertionError

            async def send(message: Message) -> None:
                nonlocal answered
                await anyio.lowlevel.checkpoint()
                answered += message["type"] == "websocket.send"

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(gateway, scope_of([HOST]), receive, send)
                for turn in range(turns):
                    await (anyio.lowlevel.checkpoint() if turn < 1000 else anyio.sleep(0.001))  # or a core is taken
                tasks.cancel_scope.cancel()
            assert scheduler.in_flight("m") == 0
            turns += 1 + turns // 20
            assert turns < DEADLINE * 1000
        assert turns > 10, "it was never cancelled inside"
        with anyio.fail_after(DEADLINE):
            while (await gateway.client("m").get("http://upstream/stub/stats")).json()["running"]:
                await anyio.sleep(0.01)


@pytest.mark.anyio
@pytest.mark.parametrize("when", ["websocket.accept", "websocket.send", "websocket.close"])
async def test_a_client_that_is_gone_when_something_is_sent(upstream: int, when: str) -> None:
    """From ASGI 2.4 on, ``send()`` raises OSError then."""
    script = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"}]
    script.append({"type": "websocket.receive", "text": "stub:cut fin"})
    heard = iter(script)
    said: list[str] = []

    async def receive() -> Message:
        for message in heard:
            return message
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        said.append(message["type"])
        if message["type"] == when:
            raise OSError("gone")

    async with remote(upstream).run() as gateway:
        with anyio.fail_after(DEADLINE):
            await gateway(scope_of([HOST]), receive, send)
    assert said[-1] == when


@pytest.mark.anyio
async def test_a_client_that_does_not_take_its_last_frame(upstream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_FAREWELL_TIMEOUT", 0.05)
    heard = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "stub:close 1000"}])

    async def receive() -> Message:
        for message in heard:
            return message
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "websocket.close":
            await anyio.sleep_forever()

    async with remote(upstream).run() as gateway:
        with anyio.fail_after(DEADLINE):
            await gateway(scope_of([HOST]), receive, send)
