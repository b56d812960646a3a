"""What a server prints: kept short, harmless and free of secrets, whatever it is."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio.abc import ByteReceiveStream

from fluidmcp_proxy.process import output as module
from fluidmcp_proxy.process.output import MAX_LINE_BYTES, MAX_LINES, Output
from tests.serving import DEADLINE

SECRET = "correct-horse-battery"


class Blocks(ByteReceiveStream):
    """A pipe that yields these blocks and ends."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        block = next(self._blocks, None)
        if block is None:
            raise anyio.EndOfStream
        return block

    async def aclose(self) -> None:
        pass


def fed(*blocks: bytes, secrets: tuple[str, ...] = ()) -> Output:
    output = Output(None, secrets=secrets)
    for block in blocks:
        output.feed(block)
    return output


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\n\none\n\n", ["one"]),
        (b"no end", ["no end"]),
        (b"  1%\r 50%\r100%\n", ["100%"]),
        (b"  1%\r 50%\r", [" 50%"]),
        (b"\ta\tb\n", ["\ta\tb"]),
        (b"\x1b[31mred\x1b[0m \x07\x00\x9b\n", ["\\x1b[31mred\\x1b[0m \\x07\\x00�"]),
        ("ü\u009b31m €\n".encode(), ["ü\\x9b31m €"]),
        (b"\xff\xfe binary \x80\n", ["�� binary �"]),
    ],
)
def test_lines(text: bytes, lines: list[str]) -> None:
    assert fed(text).tail(10) == lines
    pieces = [text[place : place + 1] for place in range(len(text))]
    assert fed(*pieces).tail(10) == lines


def test_a_ring_of_the_last_lines() -> None:
    output = fed(*(b"%d\n" % number for number in range(MAX_LINES + 5)))
    assert output.tail(10**6) == [str(number) for number in range(5, MAX_LINES + 5)]
    assert output.tail(1) == [str(MAX_LINES + 4)]
    assert output.tail(0) == []


def test_the_lines_of_one_launch() -> None:
    output = fed(b"old\n")
    output.begin()
    assert output.tail(5, of_this_launch=True) == []
    output.feed(b"new\nnewer")
    assert output.tail(5, of_this_launch=True) == ["new", "newer"]
    assert output.tail(5) == ["old", "new", "newer"]


def test_a_line_is_cut() -> None:
    output = fed(b"x" * 20_000 + b"\nnext\n")
    assert output.tail(5) == ["x" * MAX_LINE_BYTES, "next"]


def test_a_line_without_end_takes_no_memory() -> None:
    output = Output(None)
    block = b"z" * 65536
    output.feed(block)
    tracemalloc.start()
    for _ in range(160):
        output.feed(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    output.feed(b"the rest of it\nnext\n")
    assert output.tail(5) == ["z" * MAX_LINE_BYTES, "next"]


@pytest.mark.anyio
async def test_a_flood_takes_no_memory(tmp_path: Path) -> None:
    output = Output(tmp_path / "m.log")
    block = (b"flood " + b"y" * 93 + b"\n") * 655
    tracemalloc.start()
    await output.drain(Blocks(block for _ in range(300)))  # 20 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000
    assert output.tail(1) == ["flood " + "y" * 93]
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) <= 10 * 2**20
    assert sum(sizes) <= 30 * 2**20


@pytest.mark.parametrize("place", range(1, len(SECRET)))
def test_a_secret_across_two_blocks(place: int) -> None:
    text = f"key={SECRET} ok\n".encode()
    cut = place + 4
    output = fed(text[:cut], secrets=(SECRET,))
    seen = output.tail(1)[0]
    assert SECRET[:4] not in seen  # nor its beginning, while the rest is still to come
    output.feed(text[cut:])
    assert output.tail(5) == ["key=*** ok"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("HF_TOKEN=hf_abcdefghij done", "HF_TOKEN=*** done"),
        ("Bearer sk-proj-abc_DEF-0123", "Bearer ***"),
        ("hf_hub is not a key, sk-lm neither", "hf_hub is not a key, sk-lm neither"),
        ("pass.*word and passXXword", "*** and passXXword"),
        ("one_longer_than_the_other", "***"),
        ("pässwörter-€", "***"),
        ("x" * (MAX_LINE_BYTES - 3) + "correct-horse-battery", "x" * (MAX_LINE_BYTES - 3) + "***"),
        ("-----line one of a key", "***"),
    ],
)
def test_secrets(line: str, shown: str) -> None:
    secrets = (SECRET, "pass.*word", "one_longer", "one_longer_than_the_other", "pässwörter-€")
    key = "-----line one of a key\nline two of it\n"
    assert fed(line.encode() + b"\n", secrets=(*secrets, key)).tail(1) == [shown]


@pytest.mark.anyio
async def test_the_file_is_private_and_has_every_line(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "m.log"
    output = Output(path, secrets=(SECRET,))
    assert not path.parent.exists()
    await output.drain(Blocks(iter([b"one\n", SECRET.encode() + b"\nlast"])))
    assert path.read_text() == "one\n***\nlast\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await output.drain(Blocks(iter([b"again\n"])))
    assert path.read_text() == "one\n***\nlast\nagain\n"


@pytest.mark.anyio
async def test_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_BYTES", 1000)
    output = Output(tmp_path / "m.log")
    await output.drain(Blocks(b"%099d\n" % number for number in range(100)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.log", "m.log.1", "m.log.2"]
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 1000
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "m.log").read_text().endswith(f"{99:099d}\n")


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["full disk", "folder", "no folder"])
async def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    path = tmp_path / "m.log"
    if kind == "full disk":
        path.symlink_to("/dev/full")
    elif kind == "folder":
        path.mkdir()
    else:
        path = tmp_path / "file" / "m.log"
        path.parent.write_text("not a folder")
    output = Output(path)
    with caplog.at_level(logging.WARNING, "fluidmcp_proxy.process"):
        await output.drain(Blocks(b"line %d\n" % number * 1000 for number in range(100)))
        await output.drain(Blocks(iter([b"the next launch\n"])))
    assert output.tail(2) == ["line 99", "the next launch"]
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text
    with anyio.fail_after(DEADLINE):
        await output.drained()


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "m.log"
    output = Output(path)
    anyio.run(output.drain, Blocks(iter([b"one\n"])))
    assert path.exists()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the folder itself
            assert os.readlink(f"/proc/self/fd/{number}") != str(path)
