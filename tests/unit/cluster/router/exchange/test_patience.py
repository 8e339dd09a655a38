"""How long a reply is waited for. Catches a limit that knows nothing and yet is short, one below what is usual, and one
that a single slow worker talks up."""

from __future__ import annotations

import pytest

from cluster.router.exchange.patience import Patience


def learned(seconds: list[float]) -> Patience:
    patience = Patience(most_s=10.0)
    for each in seconds:
        patience.came(100, each)
    return patience


def test_nothing_is_late_before_it_is_known_what_is_usual() -> None:
    assert Patience(10.0).limit(100) == 10.0
    assert learned([0.01] * 15).limit(100) == 10.0
    assert learned([0.01] * 100).limit(5) == 10.0, "other sizes say nothing of this one"


@pytest.mark.parametrize(
    ("seconds", "low", "high"),
    [([0.001] * 100, 0.25, 0.25), ([0.2] * 100, 0.8, 0.8), ([0.2, 0.4] * 50, 1.0, 1.6), ([5.0] * 100, 10.0, 10.0)],
    ids=["fast", "even", "uneven", "never_above_the_reply_timeout"],
)
def test_late_is_what_takes_far_longer_than_usual(seconds: list[float], low: float, high: float) -> None:
    assert low - 1e-6 <= learned(seconds).limit(100) <= high + 1e-6


def test_one_slow_reply_changes_little() -> None:
    assert learned([0.01] * 100 + [0.3]).limit(100) < 1.0
