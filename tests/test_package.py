"""The package as a whole: its names, its manners on import, its rooms."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import fluidmcp_proxy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fluidmcp_proxy"

AUDIT = """
import sys
seen = []
def hook(event, args):
    if event in ("socket.__new__", "socket.connect", "socket.bind", "subprocess.Popen", "os.fork", "os.posix_spawn"):
        seen.append((event, args))
    if event == "open" and isinstance(args[0], (str, bytes)):
        name = args[0] if isinstance(args[0], str) else args[0].decode()
        if not name.endswith((".py", ".pyc", ".so", ".pth", "METADATA", "entry_points.txt", ".zip")):
            seen.append((event, args[0]))
sys.addaudithook(hook)
before = set(sys.modules)
import fluidmcp_proxy
fluidmcp_proxy.app
import threading
assert threading.active_count() == 1, threading.enumerate()
print(seen)
"""


def test_public_names() -> None:
    assert sorted(fluidmcp_proxy.__all__) == [
        "ConfigError",
        "Gateway",
        "GatewayConfig",
        "GatewayError",
        "GatewayMiddleware",
        "ModelConfig",
        "ModelState",
        "ModelStatus",
        "__version__",
        "app",
        "create_app",
        "load_config",
    ]
    for name in fluidmcp_proxy.__all__:
        assert getattr(fluidmcp_proxy, name) is not None


def test_importing_starts_opens_and_reads_nothing() -> None:
    output = subprocess.run([sys.executable, "-c", AUDIT], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_app_is_made_once() -> None:
    assert fluidmcp_proxy.app is fluidmcp_proxy.app
    assert threading.current_thread() is threading.main_thread()


def test_an_unknown_name() -> None:
    assert not hasattr(fluidmcp_proxy, "nothing")


def test_no_module_is_called_after_nothing() -> None:
    meaningless = {"utils", "helpers", "common", "base", "core", "manager"}
    assert not meaningless & {path.stem for path in PACKAGE.rglob("*.py")}


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {path.name for path in (ROOT / "tests").iterdir()}
