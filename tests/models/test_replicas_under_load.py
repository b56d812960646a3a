"""Replicas as real processes, with requests coming all the time: what dies or is restarted costs the others nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.testclient import TestClient

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.models import GatewayConfig
from fluidmcp_proxy.errors import GatewayError, UpstreamUnavailable
from fluidmcp_proxy.models.fleet import Fleet, open_fleet
from fluidmcp_proxy.models.state import ModelStatus, ReplicaStatus
from tests.models.test_fleet import until
from tests.serving import DEADLINE, STUB, eventually, free_port, serving, stub, vllm_program

pytestmark = pytest.mark.anyio

Configure = Callable[..., GatewayConfig]

HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}).encode()


@pytest.fixture
def configure(short_path: Path) -> Configure:
    """Three replicas of the stub as a ``vllm serve m`` with more arguments, unless ``keys`` say otherwise."""
    program = str(vllm_program(short_path))

    def make(*arguments: str, **keys: Any) -> GatewayConfig:
        launched = {"command": program, "args": ["serve", "m", *arguments], "replicas": 3}
        patience = {"restart_delay": 0.01, "stop_timeout": 0.3}
        model = keys if "endpoints" in keys else {**launched, **patience, **keys}
        gateway = {"log_dir": str(short_path / "log"), "runtime_dir": str(short_path / "run"), "drain_timeout": 30}
        return parse_config({"llmModels": {"m": model}, "gateway": gateway}, environ={"PATH": os.environ["PATH"]})

    return make


def all_ready(status: ModelStatus) -> bool:
    return all(replica.state == "ready" for replica in status.replicas)


class Load:
    """Clients that ask one after the other, without a pause. ``failures`` has what went wrong, and for whom."""

    def __init__(self, fleet: Fleet, clients: int) -> None:
        self._fleet = fleet
        self.clients = clients
        self.done = 0
        self.failures: list[GatewayError] = []
        self.over = False

    async def client(self) -> None:
        while not self.over:
            try:
                await self._ask()
            except GatewayError as error:
                self.failures.append(error)

    async def _ask(self) -> None:
        """As the relay does: a connect that failed is tried once more."""
        for last in (False, True):
            try:
                async with (
                    self._fleet.scheduler.lease("m") as transport,
                    transport.exchange(b"POST", b"/v1/chat/completions", HEADERS, CHAT) as response,
                ):
                    assert response.status == 200
                    assert b'"finish_reason"' in b"".join([chunk async for chunk in response.body])
                self.done += 1
                return
            except UpstreamUnavailable:
                if last:
                    raise
                await anyio.sleep(0.05)

    async def more(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = self.done + count
        with anyio.fail_after(DEADLINE):
            while self.done < wanted:
                await anyio.sleep(0.005)


@asynccontextmanager
async def load(fleet: Fleet, clients: int = 12) -> AsyncIterator[Load]:
    under = Load(fleet, clients)
    async with anyio.create_task_group() as tasks:
        for _ in range(clients):
            tasks.start_soon(under.client)
        yield under
        under.over = True


def replicas(fleet: Fleet) -> tuple[ReplicaStatus, ...]:
    return fleet.scheduler.statuses()["m"].replicas


async def test_one_of_three_is_killed_and_only_what_was_inside_it_fails(configure: Configure) -> None:
    async with open_fleet(configure("--token-interval", "0.005")) as fleet:
        await until(fleet, "m", all_ready)
        async with load(fleet) as under:
            for round_ in range(3):
                await under.more(60)
                victim = replicas(fleet)[round_]
                before = len(under.failures)
                assert victim.pid is not None
                os.kill(victim.pid, signal.SIGSTOP)  # what is inside stays there
                await under.more(60)
                os.kill(victim.pid, signal.SIGKILL)
                await until(fleet, "m", lambda status, n=round_: status.replicas[n].spawns == 2)  # type: ignore[misc]
                await until(fleet, "m", all_ready)
                await under.more(60)
                # What was inside was disconnected, and nobody else was told anything, also not that nobody is there. A
                # client has one request inside, so it fails once at most.
                assert {error.code for error in under.failures[before:]} == {"upstream_disconnected"}
                assert len(under.failures) - before <= under.clients
        assert len(under.failures) < under.done / 10
        status = fleet.scheduler.statuses()["m"]
        assert [replica.in_flight for replica in status.replicas] == [0, 0, 0]
        assert status.spawns == 6


async def test_a_rolling_restart_fails_no_request(configure: Configure) -> None:
    async with open_fleet(configure("--token-interval", "0.005", "--load-time", "0.1")) as fleet:
        await until(fleet, "m", all_ready)
        async with load(fleet) as under:
            await under.more(40)
            pids = [replica.pid for replica in replicas(fleet)]
            fewest = len(pids)
            fleet.scheduler.restart("m")
            with anyio.fail_after(DEADLINE):
                while not all(replica.spawns == 2 and replica.state == "ready" for replica in replicas(fleet)):
                    fewest = min(fewest, sum(replica.state == "ready" for replica in replicas(fleet)))
                    await anyio.sleep(0.001)
            await under.more(40)
        assert under.failures == []
        assert fewest == 2
        assert not set(pids) & {replica.pid for replica in replicas(fleet)}


async def test_what_outlasts_the_drain_is_cut_and_told_so(configure: Configure) -> None:
    config = configure(replicas=2)
    config = config.model_copy(update={"settings": config.settings.model_copy(update={"drain_timeout": 0.05})})
    hang = json.dumps({"messages": [], "stub": {"hang": 1}}).encode()
    async with open_fleet(config) as fleet:
        await until(fleet, "m", all_ready)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_restart_once_busy, fleet)
            with pytest.raises(GatewayError) as caught:
                async with (
                    fleet.scheduler.lease("m") as transport,
                    transport.exchange(b"POST", b"/v1/chat/completions", HEADERS, hang),
                ):
                    pass
        assert caught.value.code == "shutting_down"


async def _restart_once_busy(fleet: Fleet) -> None:
    while not any(replica.in_flight for replica in replicas(fleet)):
        await anyio.sleep(0.005)
    fleet.scheduler.restart("m")


async def test_each_has_its_socket_its_log_and_its_devices(configure: Configure, short_path: Path) -> None:
    arguments = ("--print-env", "CUDA_VISIBLE_DEVICES")
    async with open_fleet(configure(*arguments, gpus=[0, 1, 2, 3, 4, 5])) as fleet:
        status = await until(fleet, "m", all_ready)
        addresses = [replica.address for replica in status.replicas]
        assert len(set(addresses)) == 3
        assert all(address is not None and address.startswith("unix:/") for address in addresses)
        assert len(list((short_path / "run" / "sockets").iterdir())) == 3
    assert not list((short_path / "run" / "sockets").iterdir())
    for number, devices in enumerate(("0,1", "2,3", "4,5")):
        assert f"CUDA_VISIBLE_DEVICES={devices}\n" in (short_path / "log" / f"m.{number}.log").read_text()


async def test_another_program_is_told_a_port(configure: Configure) -> None:
    stub_command = {"command": sys.executable, "args": ["-S", "-E", str(STUB), "serve", "m"]}
    async with open_fleet(configure(**stub_command)) as fleet:
        status = await until(fleet, "m", all_ready)
        addresses = {replica.address for replica in status.replicas}
        assert len(addresses) == 3
        assert all(address is not None and address.startswith("http://127.0.0.1:") for address in addresses)
        async with load(fleet, 3) as under:
            await under.more(9)
        assert under.failures == []


async def test_a_chosen_port_that_is_taken_meanwhile_is_chosen_anew(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []

    def choose(host: str) -> int:
        port = taken if not chosen else free_port()
        chosen.append(port)
        return port

    stub_command = {"command": sys.executable, "args": ["-S", "-E", str(STUB), "serve", "m"]}
    monkeypatch.setattr("fluidmcp_proxy.models.launcher.free_port", choose)
    with stub() as taken:
        async with open_fleet(configure(**stub_command, replicas=2)) as fleet:
            status = await until(fleet, "m", all_ready)
    assert sorted(replica.restarts for replica in status.replicas) == [0, 1]


async def test_the_model_has_failed_when_all_of_them_have(configure: Configure) -> None:
    async with open_fleet(configure("--crash-after-ready", "0.05", replicas=2, max_restarts=1)) as fleet:
        status = await until(fleet, "m", "failed")
        assert [replica.state for replica in status.replicas] == ["failed", "failed"]
        assert status.message is not None
        assert "LLM model 'm." in status.message


async def test_servers_that_somebody_else_runs(configure: Configure) -> None:
    with stub() as one, stub() as other:
        urls = [{"base_url": f"http://127.0.0.1:{port}/v1"} for port in (one, other, 9)]  # nobody is at the third
        async with open_fleet(configure(endpoints=urls)) as fleet:
            await until(
                fleet, "m", lambda status: [each.state for each in status.replicas] == ["ready", "ready", "starting"]
            )
            async with load(fleet, 4) as under:
                await under.more(40)
            assert under.failures == []
            assert [replica.state for replica in replicas(fleet)] == ["ready", "ready", "starting"]
            with pytest.raises(GatewayError, match="not run by this gateway"):
                fleet.scheduler.restart("m")


def test_through_the_gateway(configure: Configure) -> None:
    gateway = Gateway(configure(affinity="header:x-session", replicas=2))
    with TestClient(gateway, base_url="http://localhost") as client:
        assert client.get("/m/v1/models").json()["data"][0]["id"] == "m"
        body = client.get("/models/m").json()
        assert body["state"] == "ready"
        assert {"id", "state", "pid", "address", "in_flight"} <= set(body["replicas"][0])
        gateway_hosts = Counter(
            value
            for _ in range(4)
            for name, value in client.post("/m/v1/echo", json={}).json()["headers"]
            if name == "host"
        )
        assert gateway_hosts == {"localhost": 4}


def test_a_large_prompt_finds_the_replica_that_knows_it(configure: Configure) -> None:
    """It comes in pieces, and on the unified route with another name put into it."""
    prompt = "x" * 400_000
    with stub() as one, stub() as other:
        urls = [{"base_url": f"http://127.0.0.1:{port}/v1"} for port in (one, other)]
        gateway = Gateway(configure(endpoints=urls, affinity="prefix"))
        with serving(gateway) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client:
            eventually(lambda: all_ready(gateway.status("m")), "both ready")
            for number in range(4):
                body = {"model": "m", "prompt": prompt, "max_tokens": 1, "seed": number}
                path = "/m/v1/completions" if number % 2 else "/v1/completions"
                assert client.post(path, json=body).status_code == 200
            assert sorted([_tokens(one), _tokens(other)]) == [0, 4]


def _tokens(port: int) -> float:
    """How many the stub server has generated."""
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE).text.splitlines():
        if line.startswith("vllm:generation_tokens_total{"):
            return float(line.rpartition(" ")[2])
    raise AssertionError
