"""The workflow of a release: GitHub can read it, it runs the session that there is, and only one job may publish."""

from __future__ import annotations

from typing import Any

import pytest

from tests.examples.test_deploy import accepted, tool
from tests.serving import STUB

ROOT = STUB.parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


@pytest.fixture
def jobs() -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def test_the_schema_of_workflows_accepts_it() -> None:
    accepted(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", WORKFLOW)


def test_what_is_built_is_what_the_session_builds(jobs: Any) -> None:
    commands = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert commands == ['python3 dev.py release -- "$GITHUB_REF_NAME"']
    assert "\ndef release(session" in (ROOT / "noxfile.py").read_text()


def test_who_may_publish_does_not_build(jobs: Any) -> None:
    trusted = [name for name, job in jobs.items() if "id-token" in job["permissions"]]
    assert trusted == ["publish"]
    assert jobs["publish"]["environment"] == "pypi"
    assert not [step for step in jobs["publish"]["steps"] if "checkout" in step.get("uses", "")]
    assert not [step for step in jobs["publish"]["steps"] if "dev.py" in step.get("run", "")]
