"""The instruments of ``benchmarks/`` can fail: what is wrong with a stream, they see."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import page
import peers
import plot
import pytest

from tests.serving import eventually, free_port, listens

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    for name in ("upstream", "streams"):
        source = ROOT / "benchmarks" / "native" / f"{name}.c"
        subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-o", str(folder / name), str(source)], check=True)
    return folder


@pytest.fixture
def upstream(programs: Path) -> Iterator[int]:
    port = free_port()
    with subprocess.Popen([programs / "upstream", str(port)]) as process:
        try:
            eventually(lambda: listens(port), "the server listens")
            yield port
        finally:
            process.kill()


def streams(programs: Path, port: int, count: int) -> dict[str, Any]:
    command = [str(programs / "streams"), str(port), "/v1/chat/completions", str(count), "0.2", "20000"]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=100, check=False)
    seen: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (seen["complete"] != seen["streams"])
    return seen


@needs_compiler
def test_streams_as_the_server_sends_them_are_complete(programs: Path, upstream: int) -> None:
    seen = streams(programs, upstream, 20)
    assert seen["complete"] == 20
    assert seen["events"] == 200
    assert seen["lost"] == seen["disordered"] == seen["altered"] == 0


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "lost": lambda body: body.replace(chunks(body)[3], b""),
    "disordered": lambda body: body.replace(chunks(body)[3] + chunks(body)[4], chunks(body)[4] + chunks(body)[3]),
    "altered": lambda body: body.replace(b" capital", b" Capital", 1),
    "cut": lambda body: body[: len(body) // 2],
    "no end": lambda body: body.removesuffix(b"0\r\n\r\n"),
    "late": lambda body: body,  # comes as a whole, when it is over
    "no [DONE]": lambda body: body.replace(b"e\r\ndata: [DONE]\n\n\r\n", b""),
}


def chunks(answer: bytes) -> list[bytes]:
    """The chunks of an answer, each with its size line."""
    body, found = answer.partition(b"\r\n\r\n")[2], []
    while body:
        size = body.index(b"\r\n") + 4 + int(body[: body.index(b"\r\n")], 16)
        found.append(body[:size])
        body = body[size:]
    return found


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_way_is_seen(programs: Path, upstream: int, fault: str) -> None:
    seen = through_a_proxy(programs, upstream, fault)
    assert seen["complete"] == (fault == "late")
    if fault == "late":
        assert seen["max_ms"] >= 180  # ten events, one every 20 ms
    elif fault in seen:
        assert seen[fault] > 0


def through_a_proxy(programs: Path, upstream: int, fault: str) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = threading.Thread(target=forward_one, args=(listener, upstream, fault))
        proxy.start()
        seen = streams(programs, listener.getsockname()[1], 1)
        proxy.join(30)
    return seen


def forward_one(listener: socket.socket, upstream: int, fault: str) -> None:
    """One request to the server; its answer with a fault."""
    client, _ = listener.accept()
    with client, socket.create_connection(("127.0.0.1", upstream), 10) as server:
        server.sendall(client.recv(65536))
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += server.recv(65536)
        client.sendall(FAULTS[fault](answer))


def test_a_plot_is_well_formed_and_longer_bars_are_larger_values() -> None:
    drawing = plot.bars("a < b", {"cost & more": {"own <1>": 5.0, "other": 50.0, "unknown": 0.0}}, own="own")
    bars = [
        (float(one.get("width", "")), one.get("class"))
        for one in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert [kind for _, kind in bars] == ["own", "other"]
    assert 0 < bars[0][0] < bars[1][0]


def test_a_table_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    rows = [["a", "1"], ["b", ""]]
    page.write("figures", page.table(["", "x"], rows))
    assert page.rows(page.read("figures")) == rows
    assert page.PAGE.read_text().startswith("before\n<!--")
    assert page.PAGE.read_text().endswith("-->\nafter\n")
    with pytest.raises(ValueError, match="markers of others"):
        page.write("others", "")


def test_a_peer_that_cannot_be_had_is_left_out_and_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    monkeypatch.setenv("PATH", "")
    missing = {proxy.name: proxy.missing for proxy in peers.everyone(install=False)}
    assert missing["production-stack router"] == missing["LiteLLM"] == missing["nginx"] == "not installed"
    assert peers._production_stack(True, "a folder").missing == "needs Python 3.12"
