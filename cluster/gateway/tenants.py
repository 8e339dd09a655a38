"""Whose requests they are, by their API keys, and how much each may ask for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from cluster.errors import RequestError

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may ask of all gateways together, each of which holds it to an equal part; None: no limit."""

    max_open: int | None = None  # sequences at once: a request with n = 4 has four
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers


class _Bucket:
    """So much a minute, at most a minute's worth at once. What is spent beyond is waited for afterwards."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = float(per_minute)
        self._level, self._filled = self._per_minute, now

    def spend(self, amount: float) -> None:
        self._level -= amount

    def wait_s(self, parts: int, now: float, amount: float) -> float:
        """How long until `amount` is there, where this is one of `parts` equal ones; 0: it is."""
        rate = self._per_minute / parts / MINUTE_S
        self._level = min(self._level + (now - self._filled) * rate, self._per_minute / parts)
        self._filled = now
        return max(min(amount, self._per_minute / parts) - self._level, 0) / rate


class Tenant:
    """One holder of keys: what it has open, and what it used of late. `n_gateways`: those that share its limits."""

    def __init__(
        self,
        name: str,
        limits: TenantLimits = TenantLimits(),
        n_gateways: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.limits = limits
        self._n_gateways = n_gateways
        self._clock = clock
        self._n_open = 0
        now = clock()
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)

    @contextmanager
    def admitted(self, n_sequences: int) -> Iterator[None]:
        """While a request for `n_sequences` runs. Raises RequestError (429) where that is more than is left."""
        self._check(n_sequences)
        if self._requests is not None:
            self._requests.spend(1)
        self._n_open += n_sequences
        try:
            yield
        finally:
            self._n_open -= n_sequences

    def spend(self, n_tokens: int) -> None:
        """So many tokens were read or written."""
        if self._tokens is not None:
            self._tokens.spend(n_tokens)

    def _check(self, n_sequences: int) -> None:
        parts, now = max(self._n_gateways(), 1), self._clock()
        most = self.limits.max_open
        if most is not None and self._n_open + n_sequences > math.ceil(most / parts):
            raise _refused(f"{most} sequences at once", 1.0)
        if self._requests is not None and (wait := self._requests.wait_s(parts, now, 1)):
            raise _refused(f"{self.limits.requests_per_minute} requests a minute", wait)
        if self._tokens is not None and (wait := self._tokens.wait_s(parts, now, 1)):
            raise _refused(f"{self.limits.tokens_per_minute} tokens a minute", wait)


#: Of the HTTP request that a task works on; None where no key is asked for.
tenant: ContextVar[Tenant | None] = ContextVar("tenant", default=None)


def _bucket(per_minute: int | None, now: float) -> _Bucket | None:
    return None if per_minute is None else _Bucket(per_minute, now)


def _refused(what: str, wait_s: float) -> RequestError:
    message = f"This API key may have {what}; try again later"
    return RequestError(message, code="rate_limit_exceeded", status=429, retry_after_s=max(1, math.ceil(wait_s)))
