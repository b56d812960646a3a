"""Who listens on a port."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest

from fluidmcp_proxy.process.listener import can_verify, port_is_free, resolve, verified_address
from tests.process.marks import STUB_COMMAND, Mark
from tests.serving import DEADLINE, free_port, stub

pytestmark = pytest.mark.anyio

US = [os.getpid()]


@contextlib.contextmanager
def listening(host: str, port: int = 0, *, only_v6: bool = True, reuse_port: bool = False) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((host, port))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("listens", "asked", "taken"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.2", True),
        ("0.0.0.0", "::1", False),
        ("::1", "::1", True),
        ("::1", "::", True),
        ("::1", "127.0.0.1", False),
        ("::", "::1", True),
        ("::", "127.0.0.1", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
    ],
)
async def test_a_listener_is_found_where_it_can_be_reached(listens: str, asked: str, taken: bool) -> None:
    if ":" in listens and not has_ipv6():
        pytest.skip("no IPv6 here")
    with listening(listens, free_port(), only_v6="ffff" not in listens) as port:
        assert await port_is_free(asked, port) is not taken
        address, is_strangers = verified_address(port, await resolve(asked), US)
        assert (address is not None, is_strangers) == (taken, False)
        assert verified_address(port, await resolve(asked), [])[1] is taken
    assert await port_is_free(asked, port)


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


async def test_a_port_in_time_wait_is_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        connection, _ = server.accept()
        connection.close()  # first, hence it is the one in TIME_WAIT
        assert client.recv(1) == b""
        client.close()
    with socket.socket() as probe, pytest.raises(OSError, match="in use"):
        probe.bind(("127.0.0.1", port))
    assert await port_is_free("127.0.0.1", port)


async def test_a_bound_port_without_a_listener_is_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert await port_is_free("127.0.0.1", port)
        assert verified_address(port, ("127.0.0.1",), US) == (None, False)


async def test_somebody_else_s_listener() -> None:
    with stub() as port:
        assert not await port_is_free("127.0.0.1", port)
        assert verified_address(port, ("127.0.0.1",), US) == (None, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_one_of_two_who_share_a_port_is_not_enough(host: str) -> None:
    script = "import socket, sys, time; s = socket.socket(); s.setsockopt(1, 15, 1); s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); print(flush=True); time.sleep(60)"  # noqa: E501
    with listening(host, reuse_port=True) as port:
        argv = [sys.executable, "-c", script, str(port)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            assert verified_address(port, ("127.0.0.1",), US) == (None, True)
            assert verified_address(port, ("127.0.0.1",), [*US, other.pid]) == ("127.0.0.1", False)
            other.kill()


async def test_the_first_address_that_is_listened_on_is_taken() -> None:
    with listening("127.0.0.1") as port:
        assert verified_address(port, ("::1", "127.0.0.1"), US) == ("127.0.0.1", False)
        assert verified_address(port, ("not an address", "127.0.0.1"), US) == ("127.0.0.1", False)


async def test_the_socket_of_a_process_that_is_gone_is_nobody_s(mark: Mark) -> None:
    port = free_port()
    with subprocess.Popen([*STUB_COMMAND, "--port", str(port)], env=mark.environment(), stdout=-3) as process:
        with anyio.fail_after(DEADLINE):
            while await port_is_free("127.0.0.1", port):
                await anyio.sleep(0.01)
        assert verified_address(port, ("127.0.0.1",), [process.pid, 2**22 + 1]) == ("127.0.0.1", False)
        process.kill()


async def test_names_are_resolved() -> None:
    assert await resolve("127.0.0.1") == ("127.0.0.1",)
    assert "127.0.0.1" in await resolve("localhost")


async def test_a_name_that_nobody_knows_stands_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:  # a real resolver would be asked over the network
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert await resolve("name.invalid") == ("name.invalid",)
    assert await port_is_free("name.invalid", 80)


async def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_verify()
    monkeypatch.setattr("fluidmcp_proxy.process.listener.sys.platform", "darwin")
    assert not can_verify()
    with listening("127.0.0.1", free_port()) as port:
        assert not await port_is_free("127.0.0.1", port)
    assert await port_is_free("127.0.0.1", port)
