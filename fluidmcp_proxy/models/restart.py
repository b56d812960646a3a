"""Whether and when a model that failed is started again: pure arithmetic, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fluidmcp_proxy.config.options import RestartPolicy

__all__ = ["MAX_DELAY", "STABLE_AFTER", "Restarts"]

MAX_DELAY = 60.0
"""Longest back-off, in seconds."""

STABLE_AFTER = 60.0
"""Seconds of ``ready`` after which earlier failures are forgotten."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """The restarts in a row, and the policy that limits them.

    ``limit`` restarts are made; the failure after the last one is final. ``delay`` is the first back-off in seconds,
    doubled each time up to ``MAX_DELAY``.
    """

    policy: RestartPolicy
    limit: int
    delay: float
    count: int = 0

    def after_failure(self, ready_for: float) -> tuple[Restarts, float | None]:
        """The count after a failure that followed ``ready_for`` seconds of service, and the seconds to wait.

        None instead of seconds: no restart. An exit that nobody asked for is a failure whatever its code, since vLLM's
        API server exits with 0 after its engine has died.
        """
        count = 0 if ready_for >= STABLE_AFTER else self.count
        if self.policy is RestartPolicy.NO or (self.policy is RestartPolicy.ON_FAILURE and count >= self.limit):
            return replace(self, count=count), None
        # 2.0 ** 1024 overflows, and "always" counts without end
        delay = min(MAX_DELAY, self.delay * 2.0 ** min(count, 16))
        return replace(self, count=count + 1), delay

    def reset(self) -> Restarts:
        """No restart so far: after an explicit start."""
        return replace(self, count=0)
