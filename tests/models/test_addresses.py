"""Where the servers listen that the gateway starts, with real processes: Unix sockets, chosen or written."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.models.fleet import open_fleet
from fluidmcp_proxy.models.state import ModelStatus
from tests.models.test_fleet import until
from tests.serving import DEADLINE, vllm_program

pytestmark = pytest.mark.anyio

Configure = Callable[..., GatewayConfig]


@pytest.fixture
def configure(short_path: Path) -> Configure:
    """A configuration with one model, the stub as a ``vllm serve m`` with more arguments."""
    program = str(vllm_program(short_path))

    def make(*arguments: str, **keys: Any) -> GatewayConfig:
        model = {"command": program, "args": ["serve", "m", *arguments], "restart_delay": 0.01, "stop_timeout": 0.3}
        gateway = {"log_dir": str(short_path / "log"), "runtime_dir": str(short_path / "run"), "drain_timeout": 0.2}
        document = {"llmModels": {"m": {**model, **keys}}, "gateway": gateway}
        return parse_config(document, environ={"PATH": os.environ["PATH"]})

    return make


def path_of(status: ModelStatus) -> Path:
    assert status.address is not None
    kind, _, path = status.address.partition(":")
    assert kind == "unix"
    return Path(path)


async def test_a_vllm_without_a_port_is_given_a_socket(configure: Configure, short_path: Path) -> None:
    async with open_fleet(configure("--enforce-eager")) as fleet:
        status = await until(fleet, "m", "ready")
        path = path_of(status)
        assert path.is_socket()
        assert path.parent.parent == short_path / "run"
    assert not path.exists()


@pytest.mark.parametrize(("written", "keys"), [(False, {}), (True, {}), (True, {"verify_listener": False})])
async def test_each_start_finds_its_way_free(
    configure: Configure, short_path: Path, written: bool, keys: dict[str, Any]
) -> None:
    """Killed, the server leaves the file of its socket behind, as when it ends by itself."""
    path = short_path / "a socket"
    async with open_fleet(configure(*(["--uds", str(path)] if written else []), **keys)) as fleet:
        first = await until(fleet, "m", "ready")
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        second = await until(fleet, "m", lambda status: status.spawns == 2 and status.state == "ready")
        assert second.restarts == 1
        assert (path_of(first) == path_of(second) == path) is written
        assert path_of(second).is_socket()
    assert not path_of(first).exists()
    assert not path_of(second).exists()


async def test_what_an_earlier_server_left_does_not_stop_the_next_one(configure: Configure, short_path: Path) -> None:
    path = short_path / "s"
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.bind(str(path))
    async with open_fleet(configure("--uds", str(path))) as fleet:
        assert (await until(fleet, "m", "ready")).spawns == 1


async def test_a_stranger_at_the_socket_gets_no_request(configure: Configure, short_path: Path) -> None:
    path = short_path / "s"
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(path))
        stranger.listen()
        async with open_fleet(configure("--uds", str(path))) as fleet:
            status = await until(fleet, "m", "failed")
        assert (status.reason, status.spawns) == ("port_in_use", 0)
        assert status.message is not None
        assert f"socket {path} is taken" in status.message
        stranger.settimeout(DEADLINE)
        connection, _ = stranger.accept()  # that of the question whether anybody accepts
        with connection:
            assert connection.recv(1) == b""
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.accept()
    assert path.exists()  # not ours to remove


async def test_a_file_at_the_socket_s_path_stays(configure: Configure, short_path: Path) -> None:
    path = short_path / "precious"
    path.write_text("data")
    async with open_fleet(configure("--uds", str(path))) as fleet:
        assert (await until(fleet, "m", "failed")).reason == "port_in_use"
    assert path.read_text() == "data"


async def test_a_runtime_folder_that_cannot_be_used(configure: Configure, short_path: Path) -> None:
    (short_path / "run").mkdir()
    (short_path / "run" / "sockets").touch()
    async with open_fleet(configure(max_restarts=1)) as fleet:
        status = await until(fleet, "m", "failed")
    assert (status.reason, status.restarts, status.spawns) == ("no_socket", 1, 0)
    assert status.message is not None
    assert "FLUIDMCP_RUNTIME_DIR" in status.message


@pytest.mark.parametrize("written", [False, True])
def test_requests_go_through_the_socket(configure: Configure, short_path: Path, written: bool) -> None:
    gateway = Gateway(configure(*(["--uds", str(short_path / "s")] if written else [])))
    with TestClient(gateway, base_url="http://localhost") as client:
        assert client.get("/m/v1/models").json()["data"][0]["id"] == "m"
        received = client.post("/m/v1/echo", json={"a": 1}).json()
        assert [value for name, value in received["headers"] if name.lower() == "host"] == ["localhost"]
        assert client.get("/models/m").json()["address"].startswith("unix:/")

        async def ask() -> int:
            return (await gateway.client("m").get("/models")).status_code

        assert client.portal is not None
        assert client.portal.call(ask) == 200


async def test_a_stalled_server_behind_a_socket_is_seen(configure: Configure) -> None:
    config = configure(liveness=True, stall_timeout=0.3)
    async with open_fleet(config) as fleet:
        await until(fleet, "m", "ready")
        body = b'{"messages": [], "stub": {"hang": 1}}'
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        with pytest.raises(Exception, match="closed"):
            async with (
                fleet.scheduler.lease("m") as transport,
                transport.exchange(b"POST", b"/v1/chat/completions", headers, body),
            ):
                pass
        status = await until(fleet, "m", lambda status: status.spawns == 2)
        assert status.restarts == 1
