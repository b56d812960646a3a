"""The arithmetic of restarts."""

from __future__ import annotations

import pytest

from fluidmcp_proxy.config.options import RestartPolicy
from fluidmcp_proxy.models.restart import MAX_DELAY, STABLE_AFTER, Restarts


def delays(restarts: Restarts, failures: int, ready_for: float = 0.0) -> list[float | None]:
    found = []
    for _ in range(failures):
        restarts, delay = restarts.after_failure(ready_for)
        found.append(delay)
    return found


@pytest.mark.parametrize(
    ("policy", "limit", "expected"),
    [
        (RestartPolicy.NO, 3, [None, None]),
        (RestartPolicy.ON_FAILURE, 0, [None]),
        (RestartPolicy.ON_FAILURE, 3, [1, 2, 4, None, None]),
        (RestartPolicy.ON_FAILURE, 8, [1, 2, 4, 8, 16, 32, 60, 60, None]),
        (RestartPolicy.ALWAYS, 1, [1, 2, 4, 8, 16, 32, 60, 60, 60]),
    ],
)
def test_delays(policy: RestartPolicy, limit: int, expected: list[float | None]) -> None:
    assert delays(Restarts(policy, limit, 1.0), len(expected)) == expected


def test_a_minute_of_service_forgets_what_was_before() -> None:
    restarts = Restarts(RestartPolicy.ON_FAILURE, 1, 1.0, count=1)
    assert restarts.after_failure(STABLE_AFTER - 0.1)[1] is None
    assert restarts.after_failure(STABLE_AFTER) == (Restarts(RestartPolicy.ON_FAILURE, 1, 1.0, count=1), 1.0)


def test_always_never_overflows() -> None:
    assert delays(Restarts(RestartPolicy.ALWAYS, 0, 0.5), 2000)[-1] == MAX_DELAY


def test_reset() -> None:
    assert Restarts(RestartPolicy.ON_FAILURE, 3, 1.0, count=3).reset().count == 0
