"""The transport below uvicorn that lets an answer's head leave with what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluidmcp_proxy.cli.protocol import _GatheringTransport

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Loop:
    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        callbacks, self.soon = self.soon, []
        for callback in callbacks:
            callback()


class Wire:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> str:
        return name


def make() -> tuple[Any, Wire, Loop]:
    wire, loop = Wire(), Loop()
    return _GatheringTransport(wire, loop), wire, loop


def test_head_and_body_are_one_write() -> None:
    transport, wire, loop = make()
    transport.write(HEAD)
    transport.write(b"body")
    transport.write(b"more")
    loop.turn()
    assert wire.written == [HEAD + b"body", b"more"]


def test_a_head_alone_leaves_in_the_same_turn() -> None:
    transport, wire, loop = make()
    transport.write(HEAD)
    assert wire.written == []
    loop.turn()
    assert wire.written == [HEAD]


def test_nothing_is_lost_by_closing() -> None:
    transport, wire, loop = make()
    transport.write(HEAD)
    transport.close()
    loop.turn()
    assert wire.written == [HEAD]
    assert wire.closed


def test_two_heads_keep_their_order() -> None:
    transport, wire, loop = make()
    transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    transport.write(HEAD)
    loop.turn()
    assert b"".join(wire.written) == b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD


def test_everything_else_is_the_transports_own() -> None:
    transport, _, _ = make()
    assert transport.get_extra_info("socket") == "socket"
