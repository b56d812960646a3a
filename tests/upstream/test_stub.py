"""Against the stub model server, a program of its own: what it received, and what it says about who left."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from fluidmcp_proxy.errors import UpstreamDisconnected, UpstreamInvalidResponse
from fluidmcp_proxy.upstream.client import Address, Transport
from tests.serving import DEADLINE, stub

from .scripted import HOST, ask, connect

pytestmark = pytest.mark.anyio

JSON = (b"content-type", b"application/json")


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    with stub() as port:
        yield Address("http", "127.0.0.1", port)


def chat(**keys: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "a b c d"}], **keys}).encode()


async def stats(transport: Transport) -> dict[str, int]:
    result: dict[str, int] = json.loads((await ask(transport, target=b"/stub/stats")).body)
    return result


async def test_echo(wire: str, server: Address) -> None:
    async with connect(server, wire) as transport:
        headers = [(b"x-b", b"1"), (b"x-a", b"2"), (b"x-b", b"3")]
        target = b"/v1/echo?x=%2e%2E/../&&y"
        said = json.loads((await ask(transport, b"PUT", target, headers, b"\x00\xff")).body)
    assert (said["method"], said["target"]) == ("PUT", target.decode())
    assert [tuple(pair) for pair in said["headers"] if pair[0].lower().startswith("x-")] == [
        ("x-b", "1"),
        ("x-a", "2"),
        ("x-b", "3"),
    ]
    assert base64.b64decode(said["body"]["base64"]) == b"\x00\xff"


@pytest.mark.parametrize("known", [True, False], ids=["content-length", "chunked"])
async def test_five_megabytes_up(wire: str, server: Address, known: bool) -> None:
    piece = bytes(range(256)) * 256

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(80):
            yield piece

    headers = [(b"content-length", b"%d" % (80 * len(piece)))] if known else []
    async with connect(server, wire) as transport:
        said = json.loads((await ask(transport, b"POST", b"/v1/echo", headers, upload())).body)
    assert said["body"]["sha256"] == hashlib.sha256(piece * 80).hexdigest()


@pytest.mark.parametrize("query", [b"", b"?chunked=1", b"?chunked=1&piece=1000"])
async def test_five_megabytes_down(wire: str, server: Address, query: bytes) -> None:
    async with connect(server, wire) as transport:
        assert len((await ask(transport, target=b"/v1/bytes/5000000" + query)).body) == 5_000_000


@pytest.mark.parametrize("token", [1, 2, 5])
async def test_stream_comes_token_by_token(wire: str, server: Address, tmp_path: Path, token: int) -> None:
    body = chat(stream=True, stub={"hang-after": token, "hang-until": str(tmp_path / "go")})
    received = b""
    async with (
        connect(server, wire) as transport,
        transport.exchange(b"POST", b"/v1/chat/completions", [HOST, JSON], body) as answer,
    ):
        async for chunk in answer.body:
            received += chunk
            if received.count(b"data: ") == 1 + token:  # the first one has the role
                (tmp_path / "go").touch()
    assert received.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_aborts_the_generation(wire: str, server: Address, stream: bool) -> None:
    async with connect(server, wire) as transport:
        before = (await stats(transport))["aborted"]
        body = chat(stream=stream, stub={"hang-after": 2} if stream else {"hang": 1})

        async def one() -> None:
            await ask(transport, b"POST", b"/v1/chat/completions", [JSON], body)

        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                while not (await stats(transport))["running"]:
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
            while (await stats(transport))["running"]:
                await anyio.sleep(0.01)
            assert (await stats(transport))["aborted"] == before + 1


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut(wire: str, server: Address, how: str) -> None:
    body = chat(stream=True, stub={"cut-after": 100, "cut-how": how})
    async with connect(server, wire) as transport:
        with pytest.raises(UpstreamDisconnected):
            await ask(transport, b"POST", b"/v1/chat/completions", [JSON], body)


async def test_garbage(wire: str, server: Address) -> None:
    async with connect(server, wire) as transport:
        with pytest.raises(UpstreamInvalidResponse):
            await ask(transport, b"POST", b"/v1/chat/completions", [JSON], chat(stub={"garbage": 1}))
