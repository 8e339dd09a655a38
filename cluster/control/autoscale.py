"""How many processes suit the traffic of a pool: from time series to a decision. Pure: no clock, no I/O.

The rule is that of Kubernetes' HorizontalPodAutoscaler: a signal says how far a pool is from its target (1: on it), the
pool grows in proportion to the signal that is furthest above, and shrinks only where none would be above afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

TOLERANCE = 0.1  # so far from its target a pool may be
_MOST_GROWTH = 2  # times, at once: signals of a pool that is overrun say little of how much it lacks


@dataclass(frozen=True, slots=True)
class Limits:
    """How many processes a pool may have."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class AutoscaleOptions:
    """When pools grow and shrink."""

    mode: Literal["off", "advise", "auto"] = "off"
    routers: Limits = Limits(1, 1)
    workers: Limits = Limits(1, 1)
    interval_s: float = 5.0  # between two looks
    window_s: float = 30.0  # over which signals are averaged before a pool grows
    idle_s: float = 300.0  # for which a pool has to be too large before it shrinks
    cooldown_s: float = 60.0  # after a change of a pool, or an attempt at one
    queue: float = 4.0  # target: sequences that wait at a router
    kv_use: float = 0.8  # target: part of a router's KV cache, and of its places in the batch
    worker_use: float = 0.7  # target: part of the time in which an expert worker computes
    worker_waiting: float = 1.0  # target: requests that wait at an expert worker


@dataclass(frozen=True, slots=True)
class Sample:
    """A pool at one moment; each signal is a multiple of its target."""

    at: float  # seconds
    n: int  # processes
    signals: Mapping[str, float]

    @property
    def load(self) -> float:
        """The signal that is furthest above its target."""
        return max(self.signals.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Decision:
    """How many processes there are to be, and why."""

    n: int
    reason: str


def decide(samples: Sequence[Sample], limits: Limits, options: AutoscaleOptions, tried: float = -math.inf) -> Decision:
    """What the samples of a pool, oldest first, say at the moment of the newest. `tried`: when it was changed last, or
    that failed."""
    now, n = samples[-1].at, samples[-1].n
    if not limits.least <= n <= limits.most:
        return Decision(min(max(n, limits.least), limits.most), f"between {limits.least} and {limits.most} are allowed")
    same = _since_last_change(samples)
    if (wait := max(tried, same[0].at) + options.cooldown_s - now) > 0 and (len(same) < len(samples) or tried > 0):
        return Decision(n, f"cools down for {wait:.0f} s more")
    if now - same[0].at < options.window_s:
        return Decision(n, f"watched for {now - same[0].at:.0f} s of {options.window_s:g} s")
    signal, load = _loudest([each for each in same if now - each.at <= options.window_s])
    said = f"{signal} at {load:.2f} of its target"
    if load > 1 + TOLERANCE:
        wanted = min(math.ceil(n * min(load, _MOST_GROWTH)), limits.most)
        return Decision(wanted, said if wanted > n else f"{said}, and there may be no more")
    if n == limits.least:
        return Decision(n, said)
    if now - same[0].at < options.idle_s:
        return Decision(n, f"{said}; watched for {now - same[0].at:.0f} s of {options.idle_s:g} s")
    peak = max((each for each in same if now - each.at <= options.idle_s), key=lambda each: each.load)
    after = peak.load * n / (n - 1)
    if after > 1 - TOLERANCE:
        return Decision(n, f"{said}; one less would have been at {after:.2f}")
    return Decision(n - 1, f"{said}; one less would have been at {after:.2f} at most for {options.idle_s:g} s")


def _since_last_change(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The newest ones, with one number of processes."""
    first = len(samples) - 1
    while first > 0 and samples[first - 1].n == samples[-1].n:
        first -= 1
    return samples[first:]


def _loudest(samples: Sequence[Sample]) -> tuple[str, float]:
    """The signal whose mean is the largest, and that mean."""
    names = {name for sample in samples for name in sample.signals}
    means = {name: sum(sample.signals.get(name, 0.0) for sample in samples) / len(samples) for name in sorted(names)}
    signal = max(means, key=lambda name: means[name], default="nothing")
    return signal, means.get(signal, 0.0)
