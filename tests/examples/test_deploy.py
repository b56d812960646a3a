"""The deployment files: their tools accept them, what they run exists, and their grace periods cover the gateway's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from fluidmcp_proxy import Gateway
from fluidmcp_proxy.cli import main
from fluidmcp_proxy.cli.run import _CUT_GRACE
from fluidmcp_proxy.config.load import parse_config
from fluidmcp_proxy.config.models import ModelConfig
from fluidmcp_proxy.config.settings import GatewaySection, Settings, variable
from tests.serving import DEADLINE, STUB, free_port, serving

DEPLOY = STUB.parent / "deploy"
DOCKERFILE = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
UNIT = (DEPLOY / "fluidmcp.service").read_text()
AFTER_STOP = 2
"""Seconds after ``stop_timeout`` within which nothing of a model is left."""


def tool(name: str) -> str:
    """Where a program is: beside this Python, on PATH, or where only root looks."""
    places = (Path(sys.executable).parent, "/usr/sbin")
    found = shutil.which(name) or next((path for place in places if (path := shutil.which(name, path=place))), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def accepted(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def seconds_to_end(stop_timeout: float) -> float:
    """From SIGTERM to the end of ``fluidmcp run`` at the latest."""
    drain: float = GatewaySection.model_fields["drain_timeout"].default
    return drain + _CUT_GRACE + stop_timeout + AFTER_STOP


def parses(*words: str) -> None:
    """Whether ``fluidmcp WORDS`` is a command with these options."""
    with click.Context(main) as context:
        main.commands[words[0]].make_context(words[0], list(words[1:]), parent=context)


# Dockerfile


def instruction(name: str) -> str:
    found: list[str] = re.findall(rf"^{name}\s+(.*)$", DOCKERFILE, re.MULTILINE)
    assert len(found) == 1, name
    return found[0]


def test_hadolint_accepts_the_dockerfile() -> None:
    accepted(tool("hadolint"), DEPLOY / "Dockerfile")


def test_the_container_runs_the_gateway_without_a_shell_and_not_as_root() -> None:
    entry, words = json.loads(instruction("ENTRYPOINT")), json.loads(instruction("CMD"))
    assert entry == ["/usr/bin/tini", "--", "fluidmcp"]
    parses(*words)
    user, _, group = instruction("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert instruction("STOPSIGNAL") == "SIGTERM"


def test_the_container_has_settings_that_exist() -> None:
    set_here = dict(word.split("=") for word in instruction("ENV").split())
    assert set(set_here) <= {variable(name) for name in Settings.model_fields}
    assert int(instruction("EXPOSE")) == GatewaySection.model_fields["port"].default
    assert "FLUIDMCP_ALLOW_OPEN" not in DOCKERFILE


def health_check(port: int) -> int:
    words = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert words[0] == "python3"
    text = words[2].replace(":8099/", f":{port}/").replace("timeout=4", f"timeout={DEADLINE}")
    return subprocess.run([sys.executable, words[1], text], stderr=subprocess.DEVNULL, check=False).returncode


def test_the_containers_health_check() -> None:
    models = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}}
    settings = {"api_keys": ["0123456789abcdef"], "allowed_hosts": ["llm.example.com"]}
    config = parse_config({"llmModels": models, "gateway": settings}, environ={})
    with serving(Gateway(config)) as port:
        assert health_check(port) == 0
    assert health_check(free_port()) != 0


def test_the_stop_time_out_that_docker_is_given() -> None:
    told = re.search(r"--stop-timeout (\d+)", (DEPLOY / "Dockerfile").read_text())
    assert told is not None
    assert int(told[1]) >= seconds_to_end(ModelConfig.model_fields["stop_timeout"].default)


# systemd


def directives(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def directive(name: str) -> str:
    found = directives(name)
    assert len(found) == 1, name
    return found[0]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    program = tmp_path / "fluidmcp"
    program.symlink_to(sys.executable)
    unit = tmp_path / "fluidmcp.service"
    text = UNIT.replace("/opt/fluidmcp/bin/fluidmcp ", f"{program} ")
    unit.write_text(text.replace("/usr/bin/nvidia-modprobe ", f"{program} "))
    assert complaints(analyze, unit) == []
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=gently"))
    assert len(complaints(analyze, unit)) == 1


def complaints(analyze: str, unit: Path) -> list[str]:
    """What is said about the unit; a directive that cannot be read is no failure of the command."""
    result = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False, timeout=240)
    return [line for line in result.stderr.splitlines() if unit.name in line]


def test_the_unit_runs_the_gateway_with_settings_that_exist() -> None:
    program, *words = shlex.split(directive("ExecStart"))
    assert program.endswith("/fluidmcp")
    parses(*words)
    environment = dict(entry.split("=", 1) for entry in directives("Environment"))
    ours = {name for name in environment if name.startswith("FLUIDMCP_")}
    assert ours <= {variable(name) for name in Settings.model_fields}
    assert environment["FLUIDMCP_RUNTIME_DIR"] == f"/run/{directive('RuntimeDirectory')}"
    assert environment["FLUIDMCP_LOG_DIR"] == f"/var/log/{directive('LogsDirectory')}"
    assert environment["HOME"] == f"/var/lib/{directive('StateDirectory')}"


def test_systemd_leaves_the_gateway_the_time_and_the_cgroup_that_it_needs() -> None:
    assert int(directive("TimeoutStopSec")) >= seconds_to_end(ModelConfig.model_fields["stop_timeout"].default)
    assert directive("KillMode") == "mixed"
    assert directive("Delegate") == "yes"
    hides = {"ProtectControlGroups", "PrivateDevices", "ProtectClock", "DeviceAllow", "ProcSubset"}
    assert not [name for name in hides if directives(name)]


# Kubernetes


def manifest(kind: str) -> Any:
    yaml = pytest.importorskip("yaml")
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod() -> Any:
    return manifest("Deployment")["spec"]["template"]["spec"]


def container() -> Any:
    (found,) = pod()["containers"]
    return found


def test_kubernetes_accepts_the_manifest() -> None:
    accepted(tool("kubernetes-validate"), "--strict", DEPLOY / "kubernetes.yaml")


def test_the_pods_grace_period_covers_its_configuration() -> None:
    text = manifest("ConfigMap")["data"]["models.json"]
    config = parse_config(json.loads(text), environ={"HF_TOKEN": "hf_example"})
    longest = max(model.stop_timeout for model in config.models.values())
    pause = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] >= pause + seconds_to_end(longest)
    deadline = manifest("Deployment")["spec"]["progressDeadlineSeconds"]
    assert deadline > max(model.startup_timeout for model in config.models.values())


def test_the_pods_variables_are_settings_and_its_runtime_folder_no_volume() -> None:
    environment = {entry["name"]: entry.get("value") for entry in container()["env"]}
    ours = {name for name in environment if name.startswith("FLUIDMCP_")}
    assert ours <= {variable(name) for name in Settings.model_fields}
    assert environment["FLUIDMCP_API_KEYS"] is None, "from the Secret"
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    runtime = Path(environment["FLUIDMCP_RUNTIME_DIR"])
    assert str(runtime) not in mounts
    assert str(runtime.parent) in mounts


@pytest.mark.parametrize(("probe", "status"), [("startup", 200), ("liveness", 200), ("readiness", 503)])
def test_the_probes_of_a_gateway_whose_model_loads(probe: str, status: int) -> None:
    from starlette.testclient import TestClient

    get = container()[f"{probe}Probe"]["httpGet"]
    models = {"m": {"endpoints": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}}
    settings = {"api_keys": ["0123456789abcdef"], "allowed_hosts": ["llm.example.com"]}
    config = parse_config({"llmModels": models, "gateway": settings}, environ={})
    headers = {header["name"]: header["value"] for header in get["httpHeaders"]}
    with TestClient(Gateway(config)) as client:
        assert client.get(get["path"], headers=headers).status_code == status
