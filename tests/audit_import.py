"""A program: imports the package and prints what that opened, started or connected, one line each; nothing is right."""

import sys
from typing import Any

PYTHONS_OWN = (".py", ".pyc", ".so", ".pth", "METADATA", "entry_points.txt", ".zip")
STARTS = ("socket.__new__", "socket.connect", "socket.bind", "subprocess.Popen", "os.fork", "os.posix_spawn")

seen: list[str] = []


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event in STARTS:
        seen.append(event)
    if event == "open" and isinstance(args[0], str | bytes):
        name = args[0] if isinstance(args[0], str) else args[0].decode()
        if not name.endswith(PYTHONS_OWN):
            seen.append(f"open {name}")


sys.addaudithook(hook)

import fluidmcp_proxy  # noqa: E402

assert fluidmcp_proxy.app is not None

import threading  # noqa: E402

seen += [f"thread {thread.name}" for thread in threading.enumerate() if thread is not threading.main_thread()]
print("\n".join(seen), end="")
