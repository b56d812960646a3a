"""A stub model server for the whole run, and the gateway in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.gateway.record import RequestRecord, log_request
from tests.serving import serving, stub


def remote(port: int, *, report: Callable[[RequestRecord], None] = log_request, **keys: Any) -> Gateway:
    """A gateway whose only model ``m`` is served on ``port`` by somebody else; the keys are the model's."""
    entry = {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}, **keys}
    # Less than anybody waits for a server's end: hypercorn does not always tell that a client has left.
    document = {"llmModels": {"m": entry}, "gateway": {"drain_timeout": 5}}
    return Gateway(parse_config(document, environ={}), report=report)


@pytest.fixture(scope="session")
def upstream() -> Iterator[int]:
    """The port of a stub model server."""
    with stub() as port:
        yield port


@pytest.fixture(scope="session", params=["uvicorn-httptools", "uvicorn-h11", "hypercorn"])
def server(request: pytest.FixtureRequest) -> str:
    """Every ASGI server that is tested."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def gateway(upstream: int, server: str) -> Iterator[int]:
    """The port of a gateway under each server."""
    with serving(remote(upstream), server) as port:
        yield port
