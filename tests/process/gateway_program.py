"""A small gateway as a program of its own, to be killed: runs one tree and prints the pid of its guardian and head."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import anyio

from fluidmcp_proxy.process.group import open_process_group
from fluidmcp_proxy.process.output import Output


async def main(options: dict[str, object]) -> None:
    env = {"PATH": os.environ["PATH"], "FAULT_TEST": os.environ["FAULT_TEST"]}
    argv = [str(word) for word in options["argv"]]  # type: ignore[attr-defined]
    print("begun", flush=True)
    async with open_process_group(argv, env=env, stop_timeout=0.2, output=Output(None)) as group:
        if options.get("fork") and os.fork() == 0:  # as multiprocessing does: with copies of every descriptor
            time.sleep(30)
            os._exit(0)
        print("started", group.pid, flush=True)
        await anyio.sleep(options.get("seconds", 60))  # type: ignore[arg-type]


signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put into the background
anyio.run(main, json.loads(sys.argv[1]), backend_options={"use_uvloop": "uvloop" in sys.argv})
