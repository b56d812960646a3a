"""What asyncio does behind anyio's back: native cancellation, and an event loop that is torn down."""

from __future__ import annotations

import asyncio
import gc
import os

import pytest

from fluidmcp_proxy.process.group import open_process_group
from fluidmcp_proxy.process.output import Output
from tests.process.marks import STUB_COMMAND, Mark, children, guardians
from tests.serving import DEADLINE, eventually

STUBBORN = [*STUB_COMMAND, "--never-ready", "--grandchild", "--ignore-sigterm"]


async def hold(mark: Mark) -> None:
    async with open_process_group(STUBBORN, env=mark.environment(), stop_timeout=0.2, output=Output(None)):
        await asyncio.Event().wait()


async def until_complete(mark: Mark) -> None:
    async with asyncio.timeout(DEADLINE):
        while mark.count() < 3:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20, None])
def test_cancelled_natively(mark: Mark, turns: int | None) -> None:
    """Leaving means gone here, too; None: when the tree is complete."""

    async def main() -> None:
        task = asyncio.create_task(hold(mark))
        if turns is None:
            await until_complete(mark)
        for _ in range(turns or 0):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not mark.pids()
        assert not guardians(os.getpid())

    asyncio.run(main())


def test_a_timeout_around_it(mark: Mark) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await hold(mark)
        assert not mark.pids()

    asyncio.run(main())


def test_the_loop_ends_around_it(mark: Mark) -> None:
    """``asyncio.run`` cancels what still runs and waits for it."""

    async def main() -> None:
        main.task = asyncio.create_task(hold(mark))  # type: ignore[attr-defined]
        await until_complete(mark)

    asyncio.run(main())
    assert not mark.pids()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_cancelled_again_while_it_ends(mark: Mark) -> None:
    """No shield holds that off; the guardian ends the tree nevertheless."""
    before = set(children(os.getpid()))

    async def main() -> None:
        task = asyncio.create_task(hold(mark))
        await until_complete(mark)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.02)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    eventually(lambda: not mark.pids() and set(children(os.getpid())) <= before, "the end of the tree and its guardian")
    gc.collect()  # what was torn apart warns here, and not in another test
