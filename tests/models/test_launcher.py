"""A model's server as a process: what is asked of the system about it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.models.child import CannotStart
from fluidmcp_proxy.models.launcher import _Process
from fluidmcp_proxy.process.group import ProcessGroup
from fluidmcp_proxy.upstream.client import Address
from tests.models.doubles import model
from tests.serving import free_port

pytestmark = pytest.mark.anyio


class Group:
    """A tree that consists of this process, or of none: as ``is_ours`` says at each look."""

    def __init__(self, *is_ours: bool) -> None:
        self._is_ours = iter(is_ours)

    def pids(self) -> frozenset[int]:
        return frozenset([os.getpid()] if next(self._is_ours) else [])


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, short_path: Path) -> Iterator[Address]:
    """Where this process listens."""
    if request.param == "tcp":
        with socket.create_server(("127.0.0.1", free_port())) as server:
            yield Address("http", "127.0.0.1", server.getsockname()[1])
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(short_path / "s"))
            server.listen()
            yield Address("http", "localhost", 80, uds=str(short_path / "s"))


def process(address: Address, *is_ours: bool) -> _Process:
    config: ModelConfig = model()
    return _Process(config, cast("ProcessGroup", Group(*is_ours)), address)


async def test_a_process_that_was_missed_in_one_look_is_no_stranger(address: Address) -> None:
    child: Any = process(address, False, True, False, True)
    assert [await child.listening() for _ in range(4)] == [None, address, None, address]


async def test_a_stranger_is_one_in_two_looks(address: Address) -> None:
    child = process(address, False, False)
    assert await child.listening() is None
    with pytest.raises(CannotStart, match="is taken") as caught:
        await child.listening()
    assert caught.value.reason == "port_in_use"
