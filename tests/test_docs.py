"""The documentation says what the code does: its links, its blocks, its lists, the messages that it quotes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import click
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import fluidmcp_proxy
from fluidmcp_proxy import Gateway
from fluidmcp_proxy.cli import main
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.migrate import migrate
from fluidmcp_proxy.config.settings import CLIENT_KEY, Settings, variable
from fluidmcp_proxy.gateway import pages
from fluidmcp_proxy.gateway.record import RequestRecord
from fluidmcp_proxy.models.address import address_of
from fluidmcp_proxy.models.launcher import _port_in_use
from fluidmcp_proxy.models.scheduler import Scheduler
from fluidmcp_proxy.models.state import ModelState
from fluidmcp_proxy.process.group import CommandError, find_program
from fluidmcp_proxy.process.owner import AlreadyOwned
from tests.models.doubles import FakeServer
from tests.serving import answers, eventually, serving, stub

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SESSIONS = re.compile(r"`(python3 dev.py [a-z][^`…]*)`")
SCRIPT = re.compile(r"`(python3? (?:benchmarks|examples)/[^`…]*)`")
INLINE = re.compile(r"`(fluidmcp [a-z][^`…]*)`")
VARIABLES = {"HF_TOKEN": "hf_example", "OPENAI_API_KEY": "sk-example"}
VARIABLES |= {name: f"{name}-0123456789abcdef" for name in ("ALICE_KEY", "OPS_KEY")}


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text()))
        if kind == language
    ]


# Blocks


@pytest.mark.parametrize("text", blocks("json"))
def test_json_blocks_are_configurations(text: str) -> None:
    document = json.loads(text)
    if "llmModels" in document:
        parse_config(document, environ=VARIABLES)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With a ``models.json`` whose model somebody else runs."""
    with stub("--served-model-name", "facebook/opt-125m") as port, tempfile.TemporaryDirectory() as name:
        models = {"vllm": {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}}}
        Path(name, "models.json").write_text(json.dumps({"llmModels": models}))
        yield Path(name)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(text, "block", "exec", dont_inherit=True)
    if "import OpenAI" in text:
        pytest.importorskip("openai")
        base = json.loads((folder / "models.json").read_text())["llmModels"]["vllm"]["endpoints"]["base_url"]
        code = compile(re.sub("http://localhost:8099(/vllm)?/v1", base, text), "block", "exec", dont_inherit=True)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "block"}
    exec(code, names)
    if "app" in names:
        prefix = "/llm" if '"/llm"' in text else ""
        with TestClient(names["app"]) as client:
            assert client.get(f"{prefix}/vllm/v1/models").status_code == 200
    for name, function in names.items():
        if name.startswith("test_"):
            function()
    if "ask" in names:
        anyio.run(asked, names["ask"])


async def asked(ask: Any) -> None:
    async with Gateway(fluidmcp_proxy.load_config("models.json")).run() as gateway:
        assert "What?" in await ask(gateway, "What?")


def shell_lines() -> Iterator[tuple[str, str]]:
    """The commands of shell blocks, continuation lines joined."""
    for page in PAGES:
        for kind, text in BLOCK.findall(page.read_text()):
            if kind == "bash":
                for line in text.replace("\\\n", " ").splitlines():
                    yield page.name, line


def options_of(line: str) -> list[str]:
    return [word.partition("=")[0] for word in shlex.split(line, comments=True) if word.startswith("-")]


# A command may have variables or a launcher in front of it.
OURS = re.compile(r"^(?:[A-Z_]+=\S+ |\w+-instrument )*(?=fluidmcp [a-z])")
COMMANDS = [(page, OURS.sub("", line)) for page, line in shell_lines() if OURS.match(line)]
COMMANDS += [(page.name, line) for page in PAGES for line in INLINE.findall(page.read_text())]


@pytest.mark.parametrize(("page", "line"), sorted(set(COMMANDS)))
def test_commands_exist_with_their_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    command = main.commands[words[0]]
    if words[1:] or page == "cli.md":
        with click.Context(main) as context:
            command.make_context(words[0], words[1:], parent=context)


def test_options_of_uvicorn_exist() -> None:
    known = {name for option in uvicorn.main.params for name in (*option.opts, *option.secondary_opts)}
    lines = [line for _, line in shell_lines() if "uvicorn fluidmcp_proxy:app" in line]
    assert lines
    assert {option for line in lines for option in options_of(line)} <= known


def test_what_the_asgi_servers_are_told_to_serve_can_be_found() -> None:
    from hypercorn.utils import load_application

    names = set(re.findall(r"(?:uvicorn|hypercorn|gunicorn) (fluidmcp_proxy:\w+)", text_of("embedding.md")))
    assert names
    for name in names:
        assert load_application(name, 0) is not None


def test_the_sessions_that_are_named_exist() -> None:
    known = {"test", "list", *re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE)}
    lines = [line.partition(" -- ")[0] for _, line in shell_lines() if line.startswith(("python3 dev.py", "nox -s"))]
    lines += [line.partition(" -- ")[0] for page in PAGES for line in SESSIONS.findall(page.read_text())]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[2:]
        assert {word.partition("-")[0] for word in words if not word.startswith("-")} <= known, line


PROGRAMS = [(page, line) for page, line in shell_lines() if re.match(r"python3? \w+/", line)]
PROGRAMS += [(page.name, line) for page in PAGES for line in SCRIPT.findall(page.read_text())]


@pytest.mark.parametrize(("page", "line"), sorted(set(PROGRAMS)))
def test_programs_exist_with_their_options(page: str, line: str) -> None:
    text = (ROOT / shlex.split(line)[1]).read_text()
    for option in {*options_of(line)} - {"--help"}:
        assert f'"{option}"' in text, option


@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_blocks_are_shell(text: str) -> None:
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_extras_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for name in re.findall(r"(?:\.|fluidmcp-proxy)\[(\w+)\]", page.read_text())}
    assert named
    assert named <= set(known)


def test_images_are_built_from_files_and_arguments_that_exist() -> None:
    lines = [shlex.split(line) for _, line in shell_lines() if line.startswith("docker build")]
    assert lines
    for words in lines:
        text = (ROOT / words[words.index("-f") + 1]).read_text()
        for word in (words[at + 1] for at, word in enumerate(words) if word == "--build-arg"):
            assert f"ARG {word.partition('=')[0]}=" in text


def test_variables_exist() -> None:
    known = {*map(variable, Settings.model_fields), CLIENT_KEY}
    told = {name for page in PAGES for name in re.findall(r"\bFLUIDMCP_[A-Z_]*[A-Z]\b", page.read_text())}
    assert {name for name in told if not name.startswith(("FLUIDMCP_INTERNAL", "FLUIDMCP_SERVICE"))} <= known


def test_every_kind_of_block_is_looked_at() -> None:
    """``text`` is what a program prints, checked by the tests of quotations; nginx by tests/examples/test_nginx.py."""
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds <= {"", "bash", "json", "nginx", "python", "text", "yaml"}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_yaml(text: str) -> None:
    assert isinstance(pytest.importorskip("yaml").safe_load(text), dict)


@pytest.fixture(scope="module")
def everywhere() -> Iterator[int]:
    """A gateway with the models that requests of the documentation name, each served by somebody else."""
    with stub("--served-model-name", "facebook/opt-125m") as vllm, stub("--served-model-name", "smol") as smol:
        ports = {"vllm": vllm, "smol": smol}
        models = {name: {"endpoints": {"base_url": f"http://127.0.0.1:{port}/v1"}} for name, port in ports.items()}
        with serving(Gateway(parse_config({"llmModels": models}, environ={}))) as gateway:
            eventually(lambda: answers(gateway, "/ready"), "ready")
            yield gateway


REQUESTS = [block for block in blocks("bash") if "curl" in block.values[0]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("text", REQUESTS)
def test_requests_by_curl_are_answered(text: str, everywhere: int) -> None:
    command = text.replace("curl ", "curl --silent --show-error --fail ").replace(":8099/", f":{everywhere}/")
    result = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    assert '"choices"' in result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_listed() -> None:
    index, readme, site = text_of("index.md"), (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index
        assert f"](docs/{page.name})" in readme
        assert f": {page.name}\n" in site


# Lists


def test_every_command_is_documented_with_its_options() -> None:
    text = text_of("cli.md")
    assert set(re.findall(r"^\| `fluidmcp (\w+)", text, re.MULTILINE)) == set(main.commands)
    for name, command in main.commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        section = re.search(rf"^## (?:\w+, )*{name}(?:, \w+)*\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        missing = {option for option in options if not re.search(rf"{option}\b", section[1])}
        assert not missing, name


def test_the_states_and_what_is_told_of_a_model() -> None:
    text = text_of("http.md").partition("## States")[2].partition("\n## ")[0]
    assert all(f"`{state}`" in text for state in ModelState)
    config = parse_config({"llmModels": {"m": {"endpoints": {"base_url": "http://127.0.0.1:1/v1"}}}}, environ={})
    scheduler = Scheduler()
    scheduler.admit(FakeServer(config.models["m"]))
    told = json.loads(pages.model(scheduler, "m")[1])
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == set(told)


def test_the_parts_of_an_access_line() -> None:
    text = text_of("observability.md").partition("## Logs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"\w+", row)] == list(RequestRecord._fields)
    line = re.search(r"INFO    (.*)", text)
    assert line is not None
    assert re.findall(r"(\w+)=", line[1]) == list(RequestRecord._fields[3:])


def test_the_table_of_metrics() -> None:
    rows = re.findall(r"^\| (`fluidmcp_[^|]*) \| (\w+) \| ([^|]*) \|", text_of("observability.md"), re.MULTILINE)
    documented = {
        name: (kind, set(re.findall(r"\w+", labels)))
        for names, kind, labels in rows
        for name in re.findall(r"\w+", names)
    }
    with stub() as port, TestClient(replicated(port)) as client:
        client.get("/m/v1/models")
        told = list(text_string_to_metric_families(client.get("/metrics").text))
    ours = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {name for sample in family.samples for name in sample.labels} - {"le"},
        )
        for family in told
        if family.name.startswith("fluidmcp_")
    }
    assert {name: kind for name, (kind, _) in documented.items()} == {name: kind for name, (kind, _) in ours.items()}
    for name, (_, labels) in ours.items():
        assert labels <= documented[name][1], name


def replicated(port: int) -> Gateway:
    endpoints = [{"base_url": f"http://127.0.0.1:{port}/v1"}, {"base_url": "http://127.0.0.1:9/v1"}]
    return Gateway(parse_config({"llmModels": {"m": {"endpoints": endpoints}}}, environ={}))


# Quotations


def test_messages_that_are_quoted_are_real() -> None:
    text = re.sub(r"\s+", " ", text_of("troubleshooting.md"))
    endpoints = {"base_url": "http://localhost:8001/v1"}
    entry = {"command": "vllm", "args": ["serve", "m", "--port", "8001"], "endpoints": endpoints}
    model = parse_config({"llmModels": {"vllm": entry}}, environ={}).models["vllm"]
    with pytest.raises(CommandError) as missing:
        find_program("vllm", {"PATH": "/nowhere"})
    for message in (
        str(missing.value).partition(";")[0],
        str(_port_in_use(model, address_of(model))).partition(";")[0],
        str(AlreadyOwned("x", 4242, alive=True)).partition(" (")[0],
        f"not ready within startup_timeout ({model.startup_timeout:g} s)",
    ):
        assert message in text


def test_the_line_about_a_taken_port_is_real() -> None:
    with stub() as port, tempfile.TemporaryDirectory() as name:
        config = Path(name, "models.json")
        config.write_text(json.dumps({"llmModels": {"m": {"endpoints": {"base_url": "http://127.0.0.1:1/v1"}}}}))
        command = [sys.executable, "-m", "fluidmcp_proxy", "run", str(config), "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 3
    assert result.stderr.replace(str(port), "8099") in text_of("troubleshooting.md")


def test_the_migration_page_shows_what_migrate_writes() -> None:
    before, after = (json.loads(text) for kind, text in BLOCK.findall(text_of("migration.md")) if kind == "json")
    assert migrate(before).document == after


def test_what_check_prints() -> None:
    from fluidmcp_proxy.cli.check import report

    example = json.loads(next(text for kind, text in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "json"))
    config = parse_config(example, environ={}).model_copy(update={"source": Path("models.json")})
    lines = [line for line in report(config) if not line.startswith("warning")]
    assert "\n".join(lines) in text_of("cli.md")
