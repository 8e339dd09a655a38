"""Rebalances by itself when it is worth it, or says what it would do; each action leaves its receipt."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Literal

from cluster.control.operator import Operator
from cluster.errors import PlacementError
from cluster.placement.load import WINDOW_S
from cluster.placement.planner import Forecast, Limits

_log = logging.getLogger(__name__)

_FEW_ROWS = 1000.0  # in the window; fewer say little of what comes
_LONGEST_WAIT = 32  # intervals, after actions that brought nothing


@dataclass(frozen=True, slots=True)
class RebalanceOptions:
    """When to act."""

    mode: Literal["off", "advise", "auto"] = "off"
    interval_s: float = 30.0  # between two looks
    horizon_s: float = 600.0  # for which the load is taken to stay as it is
    min_gain: float = 0.05  # part of the experts' time
    moved_bytes: int = 1 << 30  # of one action


@dataclass(slots=True)
class Health:
    """How the rebalancer itself is doing."""

    mode: str
    looked: float | None = None  # seconds since 1970
    decision: str = "has not looked yet"
    acting_since: float | None = None  # None: it does nothing at the moment
    succeeded: float | None = None
    failures: int = 0  # in a row
    actions: int = 0


@dataclass(slots=True)
class Rebalancer:
    """Looks at the load now and then."""

    operator: Operator
    options: RebalanceOptions
    expert_bytes: int
    health: Health = field(init=False)
    _wait: int = 1  # intervals until the next look

    def __post_init__(self) -> None:
        self.health = Health(self.options.mode)

    async def run(self) -> None:
        """For ever, unless it is off."""
        while self.options.mode != "off":
            await asyncio.sleep(self.options.interval_s * self._wait)
            try:
                await self.look()
            except PlacementError as error:
                self._failed(str(error))
            except Exception as error:
                _log.exception("the rebalancer failed")
                self._failed(f"{type(error).__name__}: {error}")
            self.health.acting_since = None

    async def look(self) -> None:
        """One decision and, in mode auto, what it says. PlacementError when it could not be carried out."""
        limits = Limits(expert_bytes=max(1, self.expert_bytes), moved_bytes=self.options.moved_bytes)
        plan = await asyncio.to_thread(self.operator.plan, limits)
        act, self.health.decision = decide(plan.forecast, self.operator.recent_rows, self.options)
        self.health.looked = time.time()
        _log.info("rebalancer: %s", self.health.decision)
        if not act or self.options.mode != "auto":
            return
        if self._brought_nothing():
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
            _log.warning("rebalancer: the last action brought nothing; the next look is in %d intervals", self._wait)
        else:
            self._wait = 1
        self.health.acting_since = time.time()
        await self.operator.rebalance(limits, f"rebalance: {self.health.decision}")
        self.health.actions += 1
        self.health.failures, self.health.succeeded = 0, time.time()

    def _brought_nothing(self) -> bool:
        """Whether the workers are no more even since the last action than before it, as far as one can say."""
        if not self.operator.receipts:
            return False
        last = self.operator.receipts[-1]
        if time.time() - last.began < WINDOW_S or last.error or last.forecast is None:
            return False
        since = last.realised(self.operator.total_rows)
        return since is not None and since >= last.imbalance_before

    def _failed(self, reason: str) -> None:
        self.health.failures += 1
        self.health.decision = f"failed: {reason}"
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        _log.warning("rebalancer: %s", self.health.decision)


def decide(forecast: Forecast, recent_rows: float, options: RebalanceOptions) -> tuple[bool, str]:
    """Whether a plan is worth its cost, and why: the time that experts save within the horizon against that of the
    loading, which takes memory and storage from them."""
    said = (
        f"imbalance {forecast.imbalance_before:.3f} -> {forecast.imbalance_after:.3f}, "
        f"{forecast.moved_replicas} replicas to load in {forecast.seconds:.1f} s"
    )
    saved_s = forecast.gain * options.horizon_s
    if recent_rows < _FEW_ROWS:
        return False, f"too few rows to say ({recent_rows:.0f} in the window)"
    if forecast.gain < options.min_gain:
        return False, f"a gain of {forecast.gain:.1%} is not worth it ({said})"
    if saved_s <= forecast.seconds:
        return False, f"{saved_s:.1f} s saved in {options.horizon_s:g} s do not pay for the loading ({said})"
    return True, f"{saved_s:.1f} s saved in {options.horizon_s:g} s ({said})"
