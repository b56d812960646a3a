"""All the set-up there is: `python3 dev.py demo` and `python3 dev.py test`; any nox session works in their place.

Needs a Python ≥ 3.11 with `venv` and nothing else. Makes one environment with nox in it, under `.cache/`; nox makes
the rest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
REPORTS = ROOT / ".cache" / "reports"
ENVIRONMENT = ROOT / ".cache" / f"nox-{sys.version_info.major}.{sys.version_info.minor}"
NOX = "nox==2026.10.20"
USAGE = """usage: python3 dev.py demo [--once] [--stub]   a real model answers through the gateway, on the CPU
       python3 dev.py test                     everything that CI checks
       python3 dev.py list                     the sessions there are
       python3 dev.py SESSION … [-- ARGS]      some of them"""


def nox() -> Path:
    """The nox program, installed if need be."""
    program = ENVIRONMENT / "bin" / "nox"
    stamp = ENVIRONMENT / "installed"
    if not stamp.exists() or stamp.read_text() != NOX:
        print(f"dev.py: installing {NOX} into {ENVIRONMENT.relative_to(ROOT)}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", NOX]
        subprocess.run(pip, check=True)
        stamp.write_text(NOX)
    return program


def failures(report: Path) -> Iterator[str]:
    """Each failed test of one of pytest's reports (JUnit's XML), with the end of what it said."""
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                said = (found.text or found.get("message") or "").splitlines()[-40:]
                yield "\n".join([f"{report.stem}: {kind} in {case.get('classname')}::{case.get('name')}", *said, ""])


def test() -> int:
    """Run every session of nox's default list, say again what failed, and end with how many sessions passed."""
    shutil.rmtree(REPORTS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        code = subprocess.run([nox(), "--report", report], cwd=ROOT, check=False).returncode
        sessions = json.loads(report.read_text())["sessions"] if report.exists() else []
    for path in sorted(REPORTS.glob("*.xml")):
        print(*failures(path), sep="\n", end="")
    for session in sessions:
        print(f"{session['result']:>8}  {session['name']}")
    results = [session["result"] for session in sessions]
    passed, skipped = results.count("success"), results.count("skipped")
    failed = len(results) - passed - skipped
    print(f"sessions: {passed} passed, {failed} failed, {skipped} skipped")
    return code or int(failed > 0 or passed == 0)


def main(arguments: list[str]) -> int:
    """Run what was asked for."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python is there
        print("dev.py needs Python 3.11 or newer; this is", sys.version.split()[0], file=sys.stderr)
        return 2
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments == ["test"]:
        return test()
    if arguments == ["list"]:
        command = ["--list"]
    elif arguments[0] == "demo":
        command = ["-s", "demo", "--", *arguments[1:]]
    else:
        command = ["-s", *arguments]
    return subprocess.run([nox(), "-f", ROOT / "noxfile.py", *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
