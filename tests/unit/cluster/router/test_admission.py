"""Catches: a queue without a bound, a promise that cannot be kept, a Retry-After that is no use."""

from __future__ import annotations

from cluster.router.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(seats: int, queue: int, wait_s: float, per_s: float) -> Admission:
    """One where `per_s` requests have ended every second of late."""
    clock = Clock()
    admission = Admission(seats, queue, wait_s, clock)
    for _ in range(40):
        admission.ended()
        clock.now += 1 / per_s
    return admission


def test_seats_and_queue_bound_it_while_the_pace_is_unknown() -> None:
    admission = Admission(4, 8, 30)
    assert [admission.refuse(n) is None for n in (0, 3, 4, 11, 12, 100)] == [True] * 4 + [False] * 2
    refusal = admission.refuse(12)
    assert refusal is not None and (refusal.code, refusal.status) == ("queue_full", 429)


def test_who_would_wait_too_long_is_told_when_to_come_again() -> None:
    admission = paced(4, 1000, 30, per_s=2)
    assert admission.expected_wait_s(3) == 0
    assert abs(admission.expected_wait_s(23) - 10) < 1
    assert admission.refuse(60) is None
    refusal = admission.refuse(4 + 2 * 50)
    assert refusal is not None and refusal.retry_after_s is not None and 15 <= refusal.retry_after_s <= 25


def test_an_old_pace_is_forgotten() -> None:
    clock = Clock()
    admission = Admission(1, 100, 30, clock)
    admission.ended()
    clock.now += 50
    admission.ended()
    clock.now += 1000
    assert admission.refuse(50) is None
