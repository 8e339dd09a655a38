"""How long a reply may take before another replica is asked: learned from the replies that came."""

from __future__ import annotations

_LEAST_S = 0.25  # a process that has no core for a moment is not slow
_SAMPLES = 16  # fewer say nothing
_DEVIATIONS, _MEANS = 8.0, 4.0
_WEIGHT, _DEVIATION_WEIGHT = 1 / 8, 1 / 4


class Patience:
    """Mean and mean deviation of the waiting times, as TCP keeps them of its round trips (RFC 6298), for each power of
    two of rows. Those of all workers together, so that one that stays slow does not become the measure."""

    def __init__(self, most_s: float) -> None:
        """`most_s`: where nothing is known, and at most."""
        self._most_s = most_s
        self._known: dict[int, list[float]] = {}  # by bit length of the rows: samples, mean, mean deviation

    def came(self, n_rows: int, seconds: float) -> None:
        """A reply of `n_rows` was awaited for so long."""
        known = self._known.get(n_rows.bit_length())
        if known is None:
            self._known[n_rows.bit_length()] = [1, seconds, seconds / 2]
            return
        known[0] += 1
        error = seconds - known[1]
        known[1] += _WEIGHT * error
        known[2] += _DEVIATION_WEIGHT * (abs(error) - known[2])

    def limit(self, n_rows: int) -> float:
        """Seconds after which a reply of `n_rows` is late."""
        samples, mean, deviation = self._known.get(n_rows.bit_length(), (0, 0.0, 0.0))
        if samples < _SAMPLES:
            return self._most_s
        return min(self._most_s, max(_LEAST_S, mean + _DEVIATIONS * deviation, _MEANS * mean))
