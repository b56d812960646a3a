"""Real servers for tests: the stub model server as a process, any ASGI app under uvicorn or hypercorn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypercorn.asyncio
import hypercorn.config
import uvicorn

from fluidmcp_proxy.cli.protocol import GatewayProtocol
from tests.ports import free_port as free_port

STUB = Path(__file__).parent.parent / "examples" / "stub_server.py"
DEADLINE = 60.0
"""Seconds after which waiting for anything fails a test: there to end a hang, on a machine however busy."""


def eventually(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait until ``condition()`` is true, and return it; an assertion error after the deadline."""
    end = time.monotonic() + DEADLINE
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what or condition}"
        time.sleep(0.01)
    return result


def answers(port: int, path: str = "/health") -> bool:
    """Whether ``GET path`` is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def vllm_program(folder: Path) -> Path:
    """The stub server as a program called ``vllm``, which is told its address as vLLM is."""
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {STUB} "$@"\n')
    program.chmod(0o755)
    return program


@contextlib.contextmanager
def stub(*arguments: str, ready: bool = True) -> Iterator[int]:
    """The stub model server, run by somebody else than the gateway; yields its port."""
    port = free_port()
    command = [sys.executable, "-S", "-E", str(STUB), "serve", "m", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if ready:
            eventually(lambda: answers(port), "stub server ready")
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def serving(app: Any, server: str = "uvicorn-httptools") -> Iterator[int]:
    """``app`` in a thread under ``hypercorn``, or ``uvicorn-`` with a parser or, as in ``fluidmcp run``, ``run``.

    Yields its port. ``uvicorn-PARSER-wsproto`` does not speak WebSocket by the websockets package.
    """
    name, *ways = server.split("-")
    with _uvicorn(app, *ways) if name == "uvicorn" else _hypercorn(app) as port:
        yield port


@contextlib.contextmanager
def _uvicorn(app: Any, parser: str, ws: str = "websockets-sansio") -> Iterator[int]:
    config = uvicorn.Config(
        app,
        http=GatewayProtocol if parser == "run" else parser,
        ws=ws,
        log_level="critical",
        lifespan="on",
        timeout_graceful_shutdown=5,
        proxy_headers=False,
    )
    instance = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=instance.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            eventually(lambda: instance.started or not thread.is_alive(), "uvicorn started")
            assert instance.started
            yield listening.getsockname()[1]
        finally:
            instance.should_exit = True
            thread.join(DEADLINE)
            assert not thread.is_alive()


class _HypercornLoop(asyncio.SelectorEventLoop):
    """From Python 3.12.1 on ``wait_closed()`` waits for connections, too, and hypercorn does that without a limit.

    One whose body nobody has read to its end it never closes by itself.
    """

    async def create_server(self, *args: Any, **keys: Any) -> asyncio.Server:
        server = await super().create_server(*args, **keys)
        server.wait_closed = partial(asyncio.sleep, 0)  # type: ignore[method-assign]
        return server


@contextlib.contextmanager
def _hypercorn(app: Any) -> Iterator[int]:
    port = free_port()
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.errorlog = config.accesslog = None
    config.graceful_timeout = 5
    ready, loop, over = threading.Event(), _HypercornLoop(), asyncio.Event()

    async def main() -> None:
        ready.set()
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=over.wait)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    try:
        ready.wait(DEADLINE)
        eventually(lambda: listens(port), "hypercorn started")
        yield port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(DEADLINE)
        assert not thread.is_alive()
        loop.close()


def listens(port: int) -> bool:
    """Whether somebody takes a connection."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def raw_exchange(port: int, request: bytes) -> tuple[bytes, bool]:
    """Send bytes and read until the connection ends; and whether it was reset rather than closed."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(request)
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            return bytes(received), True
    return bytes(received), False
