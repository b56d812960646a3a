"""The real program with the stub server as its ``vllm``: how it starts, how it ends, what it leaves (nothing)."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from fluidmcp_proxy.cli.run import bind
from fluidmcp_proxy.config.load import parse_config
from tests.cli.program import FLUIDMCP, Program
from tests.process.marks import Mark, content
from tests.serving import DEADLINE, STUB, eventually, free_port


@pytest.mark.parametrize("command", [FLUIDMCP, [str(Path(sys.executable).with_name("fluidmcp")), "run"]])
def test_ready(program: Program, config: Path, mark: Mark, command: list[str]) -> None:
    with program(*command, str(config), "--port", "0") as gateway:
        url = gateway.until_said("ready at").split()[-1]
        assert httpx.get(f"{url}/models", timeout=DEADLINE).json()["data"][0]["id"] == "m"
        assert mark.count() == 3
        gateway.send(signal.SIGTERM)
        assert gateway.ended() == -signal.SIGTERM
        assert not mark.pids()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_cuts_streams_and_is_passed_on(
    program: Program, config: Path, mark: Mark, number: signal.Signals, times: int
) -> None:
    body = {"model": "m", "prompt": "x", "stream": True, "max_tokens": 9999, "stub": {"token-interval": 0.01}}
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        url = gateway.until_said("ready at").split()[-1]
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=DEADLINE) as answer:
            chunks = answer.iter_raw()
            next(chunks)
            for _ in range(times):
                gateway.send(number)
                time.sleep(0.03)
            with pytest.raises(httpx.TransportError):
                for _ in chunks:
                    pass
        assert gateway.ended() == -number
        assert not mark.pids()
        assert "Traceback" not in gateway.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads(program: Program, config: Path, mark: Mark, number: signal.Signals) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0") as gateway:
        gateway.until_said("gateway on")
        gateway.send(number)
        assert gateway.ended() == -number
        assert not mark.pids()


ONCE_MORE = """
import asyncio, os, signal
from fluidmcp_proxy.cli import main
from fluidmcp_proxy.cli.logs import Terminal
plain = Terminal.flush
def flush(self):
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        os.kill(os.getpid(), signal.SIGINT)
    plain(self)
Terminal.flush = flush
main()
"""


def test_a_signal_once_more_when_the_server_has_ended(program: Program, config: Path) -> None:
    with program(sys.executable, "-c", ONCE_MORE, "run", str(config), "--port", "0") as gateway:
        gateway.until_said("gateway on")
        gateway.send(signal.SIGINT)
        assert gateway.ended() == -signal.SIGINT, gateway.said


def test_websocket(program: Program, config: Path) -> None:
    """With a message that is larger than uvicorn's own limit, and nothing of the handshake in the log."""
    with program(*FLUIDMCP, str(config), "--port", "0", "--log-level", "trace") as gateway:
        url = gateway.until_said("ready at").split()[-1].replace("http://", "ws://")
        headers = {"Authorization": "Bearer sk-secret"}
        message = b"x" * 17_000_000
        with connect(f"{url}/realtime?key=sk-secret", additional_headers=headers, proxy=None, max_size=None) as client:
            client.send(message)
            assert client.recv(timeout=DEADLINE) == message
            assert client.response is not None
            assert "Sec-WebSocket-Extensions" not in client.response.headers
            gateway.send(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(timeout=DEADLINE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert gateway.ended() == -signal.SIGTERM
        assert "model=m status=101 bytes=17000000" in gateway.said
        assert "sk-secret" not in gateway.said


def test_killed_and_started_again_at_once(program: Program, config: Path, mark: Mark) -> None:
    """The predecessor's tree still holds the port; it is waited for, not taken for a stranger."""
    command = [*FLUIDMCP, str(config), "--port", "0"]
    with program(*command) as first:
        first.until_said("ready at")
        before = mark.pids()
        first.send(signal.SIGKILL)
        with program(*command) as second:
            second.until_said("ready at")
            assert not before & mark.pids()
            second.send(signal.SIGTERM)
            assert second.ended() == -signal.SIGTERM


def test_a_second_one_is_refused(program: Program, config: Path, mark: Mark) -> None:
    command = [*FLUIDMCP, str(config), "--port", "0"]
    with program(*command) as first:
        first.until_said("ready at")
        second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert second.returncode == 3, second.stderr
        assert f"the gateway with pid {first.pid} runs this configuration already" in second.stderr
        assert "Traceback" not in second.stderr
        assert mark.count() == 3


def test_a_port_that_is_taken_starts_no_model(config: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        argv = [*FLUIDMCP, str(config), "--port", port]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 3, done.stderr
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("content", [None, "{", '{"llmModels": {}}'])
def test_a_bad_configuration(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "models.json"
    if content is not None:
        path.write_text(content)
    done = subprocess.run([*FLUIDMCP, str(path)], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert str(path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- the app under other people's servers


def test_under_uvicorn(program: Program, mark: Mark) -> None:
    port = free_port()
    with program(sys.executable, "-m", "uvicorn", "fluidmcp_proxy:app", "--port", str(port)) as server:
        server.until_said("running on")
        assert httpx.get(f"http://127.0.0.1:{port}/m/v1/models", timeout=DEADLINE).status_code == 200
        server.send(signal.SIGTERM)
        assert server.ended() == -signal.SIGTERM
        assert not mark.pids()


def test_uvicorn_interrupted_twice_with_a_stream(program: Program, mark: Mark) -> None:
    """It leaves without the end of the lifespan, and the event loop is torn down around what still runs."""
    port = free_port()
    body = {"model": "m", "prompt": "x", "stream": True, "max_tokens": 9999, "stub": {"token-interval": 0.01}}
    with program(sys.executable, "-m", "uvicorn", "fluidmcp_proxy:app", "--port", str(port)) as server:
        server.until_said("running on")
        url = f"http://127.0.0.1:{port}/m/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=DEADLINE) as answer:
            next(answer.iter_raw())
            for _ in range(2):
                server.send(signal.SIGINT)
                time.sleep(0.03)
            server.ended()
        eventually(lambda: not mark.pids(), "the end of the models")


def test_uvicorn_with_two_workers_ends_as_a_whole(program: Program) -> None:
    argv = [sys.executable, "-m", "uvicorn", "fluidmcp_proxy:app", "--port", str(free_port()), "--workers", "2"]
    with program(*argv) as server:
        server.ended()  # with any code: uvicorn's parent process does not pass it on
        assert "runs this configuration already" in server.said
        assert "--workers 1" in server.said


def test_under_hypercorn(program: Program, mark: Mark) -> None:
    port = free_port()
    app = "fluidmcp_proxy:app"
    with program(sys.executable, "-m", "hypercorn", app, "-b", f"127.0.0.1:{port}") as server:
        server.until_said("Running on")
        assert httpx.get(f"http://127.0.0.1:{port}/m/v1/models", timeout=DEADLINE).status_code == 200
        server.send(signal.SIGTERM)
        server.ended()
        # Nothing of the models; multiprocessing's resource tracker may outlast hypercorn.
        assert not [pid for pid in mark.pids() if STUB.name.encode() in content(pid, "cmdline")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_address_without_keys_is_refused(program: Program, config: Path, host: str) -> None:
    with program(*FLUIDMCP, str(config), "--port", "0", "--host", host) as gateway:
        assert gateway.ended() == 2
        assert gateway.said.startswith("invalid_value: ")
        assert "api_keys" in gateway.said
        assert "--allow-open" in gateway.said
        assert len(gateway.said.splitlines()) == 1


@pytest.mark.parametrize(
    ("host", "options", "keys", "warned"),
    [
        ("127.0.0.1", [], [], False),
        ("localhost", [], [], False),
        ("0.0.0.0", ["--allow-open"], [], True),
        ("0.0.0.0", [], ["0123456789abcdef"], False),
    ],
)
def test_being_open_to_the_network_is_said(
    program: Program,
    config: Path,
    host: str,
    options: list[str],
    keys: list[str],
    warned: bool,
) -> None:
    document = json.loads(config.read_text())
    document["gateway"]["api_keys"] = keys
    config.write_text(json.dumps(document))
    with program(*FLUIDMCP, str(config), "--port", "0", "--host", host, *options) as gateway:
        gateway.until_said("FluidMCP gateway on")
        assert ("open to the network" in gateway.said) is warned
        gateway.send(signal.SIGTERM)
        gateway.ended()


def test_who_may_come(program: Program, config: Path) -> None:
    """Bound to loopback: its own names only, its own pages only, and a key where there is one."""
    document = json.loads(config.read_text())
    document["gateway"]["api_keys"] = [{"name": "alice", "key": "${ALICE_KEY}"}]
    config.write_text(json.dumps(document))
    secret = "kanarie-0123456789abcdef"
    with program(*FLUIDMCP, str(config), "--port", "0", "--log-level", "trace", ALICE_KEY=secret) as gateway:
        url = gateway.until_said("ready at").split()[-1]
        key = {"Authorization": f"Bearer {secret}"}
        for headers, status in (
            ({}, 401),
            (key, 200),
            ({"X-API-Key": secret}, 200),
            ({**key, "Host": "localhost:1"}, 200),
            ({**key, "Host": "evil.example"}, 421),
            ({**key, "Origin": "https://evil.example"}, 403),
            ({**key, "Origin": url.removesuffix("/m/v1")}, 200),
        ):
            assert httpx.get(f"{url}/models?key={secret}", headers=headers, timeout=DEADLINE).status_code == status
        gateway.send(signal.SIGTERM)
        gateway.ended()
        assert "key=alice" in gateway.said
        assert secret not in gateway.said


@pytest.mark.anyio
async def test_answers_are_not_held_back() -> None:
    """By Nagle's algorithm, together with a client's delayed acknowledgement: 40 ms for each small answer."""
    config = parse_config({"llmModels": {"m": {"endpoints": {"base_url": "http://127.0.0.1:9/v1"}}}}, environ={})
    seen: list[int] = []

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("socket")
        seen.append(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listening = bind(config.settings.model_copy(update={"port": 0}))
    async with await asyncio.start_server(accepted, sock=listening):
        reader, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        await reader.read()
        writer.close()
    assert seen == [1]
