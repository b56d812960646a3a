"""The project's sessions. `nox` alone runs what CI runs; `nox --list` shows all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SUPPORTED = ("3.11", "3.12", "3.13")

# Many tests wait for a process or a deadline, so there are more processes than cores.
IN_PARALLEL = ("-n", "3", "--dist", "worksteal")

nox.options.sessions = ["lint", "types", "tests", "lowest", "examples", "docs", "page", "build", "e2e"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def interpreters() -> list[str]:
    """The supported Pythons that this machine has, on PATH or installed by pyenv, as their versions."""
    found: dict[str, str] = {}
    for version in SUPPORTED:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in (shutil.which(f"python{version}"), *pyenv):
            # A shim of pyenv can be there without the Python behind it.
            if candidate and (program := _program(candidate)):
                found.setdefault(version, program)
    # nox looks for them on PATH
    os.environ["PATH"] = os.pathsep.join([*(str(Path(path).parent) for path in found.values()), os.environ["PATH"]])
    return list(found)


def _program(python: str | Path) -> str:
    """The interpreter itself, or nothing if it cannot make an environment."""
    command = [python, "-c", "import sys, venv, ensurepip; print(sys.executable)"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def group(name: str) -> list[str]:
    """The requirements of a dependency group (PEP 735)."""
    requirements: list[str] = []
    for item in PYPROJECT["dependency-groups"][name]:
        requirements += [item] if isinstance(item, str) else group(item["include-group"])
    return requirements


def lowest_versions() -> list[str]:
    """The runtime dependencies at the lowest version that pyproject.toml admits."""
    return [re.sub(r">=\s*([^,;\s]+).*", r"==\1", requirement) for requirement in PYPROJECT["project"]["dependencies"]]


def package_version() -> str:
    """The version, read and not imported."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "fluidmcp_proxy" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest; what failed is also written where dev.py looks, which says it once more at its end."""
    report = ROOT / ".cache" / "reports" / f"{session.name}.xml"
    session.run("pytest", f"--junit-xml={report}", *arguments, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, and who may import whom."""
    session.install("-e", ".", *group("lint"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strictly."""
    session.install("-e", ".", *group("types"))
    session.run("mypy")


@nox.session(python=interpreters())
def tests(session: nox.Session) -> None:
    """Everything that needs no vLLM."""
    session.install("-e", ".", *group("test"))
    pytest(session, *IN_PARALLEL, "-m", "not e2e and not page")


@nox.session
def lowest(session: nox.Session) -> None:
    """The same with the lowest versions of the direct dependencies."""
    session.install("-e", ".", *group("test"), *lowest_versions())
    pytest(session, *IN_PARALLEL, "-m", "not e2e and not page")


@nox.session
def fuzz(session: nox.Session) -> None:
    """The tests against any input, with many more examples."""
    session.install("-e", ".", *group("test"))
    pytest(session, "-m", "fuzz", "--hypothesis-profile", "fuzz", "--timeout", "0")


@nox.session
def examples(session: nox.Session) -> None:
    """Every example, run, and the documentation's."""
    session.install("-e", ".", *group("examples"))
    pytest(session, "tests/examples", "tests/test_docs.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/: a link that leads nowhere fails. -- serve: while you write."""
    session.install("-e", ".", *group("docs"))
    session.run("mkdocs", *(session.posargs or ("build", "--strict")), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """A wheel in a clean environment: complete, importable without side effects."""
    session.install("build")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", folder, silent=True)
    wheel = max(Path(folder).glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install("--force-reinstall", str(wheel), "twine")
    session.run("twine", "check", "--strict", str(wheel))
    session.run("python", str(ROOT / "tests" / "check_wheel.py"), str(wheel))


@nox.session
def release(session: nox.Session) -> None:
    """What a release has, in dist/: packages, lock file, SBOM, checksums. -- v1.2.3: only if that is the version."""
    for tag in session.posargs:
        released = f"## [{tag.removeprefix('v')}]" in (ROOT / "CHANGELOG.md").read_text()
        if tag != f"v{package_version()}" or not released:
            session.error(f"{tag} is not the version in fluidmcp_proxy/__init__.py, or CHANGELOG.md does not have it")
    session.install(*group("release"))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    packages = sorted(str(path) for path in dist.iterdir())
    session.run("twine", "check", "--strict", *packages)
    lock = str(dist / "requirements.lock")
    options = ("--universal", f"--python-version={SUPPORTED[0]}", "--generate-hashes", "--no-header", "--quiet")
    session.run("uv", "pip", "compile", "pyproject.toml", *options, "--output-file", lock)
    environment = Path(session.create_tmp(), "locked")
    session.run("python", "-m", "venv", "--clear", str(environment))
    pip = (str(environment / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
    session.run(*pip, "install", "--require-hashes", "-r", lock, external=True)
    session.run(*pip, "install", "--no-deps", next(path for path in packages if path.endswith(".whl")), external=True)
    session.run(*pip, "check", external=True)
    session.run(str(environment / "bin" / "fluidmcp"), "--version", external=True)
    session.run(*pip, "uninstall", "--yes", "pip", "setuptools", external=True)  # no part of what is released
    bill = ("--pyproject", "pyproject.toml", "--output-reproducible", "--output-file", str(dist / "sbom.cdx.json"))
    session.run("cyclonedx-py", "environment", str(environment / "bin" / "python"), *bill)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(dist.iterdir())]
    (dist / "SHA256SUMS").write_text("".join(sums))


@nox.session
def e2e(session: nox.Session) -> None:
    """A real vLLM on the CPU, driven by the SDKs."""
    session.install("-e", ".", *group("e2e"))
    # LangChain and LiteLLM keep clients for ever, so the interpreter's end finds sockets that nobody has closed.
    theirs = ("-W", "default::ResourceWarning", "-W", "default::pytest.PytestUnraisableExceptionWarning")
    pytest(session, *theirs, "-m", "e2e", "tests/e2e")


@nox.session
def page(session: nox.Session) -> None:
    """The status page in Chromium; -- --screenshots takes the docs' pictures."""
    if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        packages = ("chromium", "fonts-dejavu-core")
        for command in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
            session.run("apt-get", "-qq", *command, external=True, silent=True, success_codes=range(256))
    if shutil.which("chromium") is None:
        session.skip("it needs Chromium, which apt-get could not install: apt-get install chromium")
    session.install("-e", ".", *group("page"))
    if session.posargs == ["--screenshots"]:
        session.run("python", "-m", "tests.page.screenshots", str(ROOT / "docs"))
    else:
        pytest(session, "-n", "2", "-m", "page", "tests/page")


@nox.session
def demo(session: nox.Session) -> None:
    """A real model answers through the gateway."""
    session.install("-e", ".")
    # Ctrl-C: the gateway drains and ends its model; nox would kill it after half a second.
    session.run("python", "examples/demo.py", *session.posargs, interrupt_timeout=90, terminate_timeout=90)


@nox.session
def faults(session: nox.Session) -> None:
    """What is left when something is killed: the table of docs/reliability.md."""
    session.install("-e", ".")
    session.run("python", "benchmarks/faults.py", *session.posargs)


@nox.session
def swaps(session: nox.Session) -> None:
    """What it costs when two models of a group take turns; with two real vLLMs: -- --real --clients 8."""
    session.install("-e", ".")
    session.run("python", "benchmarks/swapping.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """What forwarding costs, beside its peers, and what the gateway withstands: the figures of docs/performance.md."""
    session.install("-e", ".")
    both, own = ("--quick", "--no-install"), ("--real",)
    forwarding = [argument for argument in session.posargs if argument not in own]
    endurance = [argument for argument in session.posargs if argument in both + own]
    session.run("python", "benchmarks/forwarding.py", *forwarding)
    session.run("python", "benchmarks/endurance.py", *endurance)


@nox.session
def profile(session: nox.Session) -> None:
    """Where the gateway's time goes under load."""
    session.install("-e", ".")
    session.run("python", "benchmarks/forwarding.py", "--profile", *session.posargs)
