"""Catches: a queue without a bound, a promise that cannot be kept, a Retry-After that is no use; a tenant that takes
what belongs to another."""

from __future__ import annotations

import pytest

from cluster.router.admission import Admission
from cluster.router.shares import fair_seats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Filled(Admission):
    """With `open` requests of each tenant; `per_s` requests have ended every second of late."""

    def __init__(self, seats: int, places: int, wait_s: float, per_s: float = 0.0, **open_: int) -> None:
        clock = Clock()
        super().__init__(seats, places, wait_s, clock)
        for i in range(40 if per_s else 0):
            self.taken(str(i), "gone")
            self.ended(str(i))
            clock.now += 1 / per_s
        for tenant, n in open_.items():
            for i in range(n):
                self.taken(f"{tenant}{i}", tenant)


def test_seats_and_queue_bound_it_while_the_pace_is_unknown() -> None:
    found = [Filled(4, 8, 30, a=n).refuse("a") is None for n in (0, 3, 4, 11, 12, 100)]
    assert found == [True] * 4 + [False] * 2
    refusal = Filled(4, 8, 30, a=12).refuse("a")
    assert refusal is not None and (refusal.code, refusal.status) == ("queue_full", 429)


def test_who_would_wait_too_long_is_told_when_to_come_again() -> None:
    assert Filled(4, 1000, 30, per_s=2, a=3).queue.expected_wait_s("a") == 0
    assert abs(Filled(4, 1000, 30, per_s=2, a=23).queue.expected_wait_s("a") - 10) < 1
    assert Filled(4, 1000, 30, per_s=2, a=44).refuse("a") is None
    refusal = Filled(4, 1000, 30, per_s=2, a=4 + 2 * 50).refuse("a")
    assert refusal is not None and refusal.retry_after_s is not None and 22 <= refusal.retry_after_s <= 32


def test_an_old_pace_is_forgotten() -> None:
    clock = Clock()
    admission = Admission(1, 100, 30, clock)
    for i in range(2):
        admission.taken(str(i), "")
        admission.ended(str(i))
        clock.now += 50
    clock.now += 1000
    for i in range(50):
        admission.taken(str(i), "")
    assert admission.refuse("") is None


def test_a_tenant_that_fills_the_queue_leaves_others_their_share() -> None:
    full = Filled(8, 16, 30, a=24)
    assert full.refuse("a") is not None
    assert full.refuse("b") is None, "half of the seats are its own"
    assert Filled(8, 16, 30, a=24, b=3).refuse("b") is None
    assert Filled(8, 16, 30, a=24, b=4).refuse("b") is not None, "to wait there is no place yet"
    assert Filled(8, 16, 30, a=14, b=4).refuse("a") is not None, "who waits most leaves places to others"
    assert Filled(8, 16, 30, a=14, b=4).refuse("b") is None


def test_a_tenant_waits_as_its_own_requests_do() -> None:
    """8 seats, 8 ends a second: b's 5th request is the first of its own to wait, whatever waits of a."""
    crowded = Filled(8, 1000, 30, per_s=8, a=400, b=4)
    assert crowded.queue.expected_wait_s("a") > 80
    assert 0 < crowded.queue.expected_wait_s("b") < 1
    assert crowded.refuse("a") is not None and crowded.refuse("b") is None


@pytest.mark.parametrize(
    ("demands", "seats", "expected"),
    [({"a": 3}, 8, {"a": 3}), ({"a": 30}, 8, {"a": 8}), ({"a": 30, "b": 30}, 8, {"a": 4, "b": 4}),
     ({"a": 30, "b": 1}, 8, {"a": 7, "b": 1}), ({"a": 30, "b": 2, "c": 30}, 9, {"a": 3.5, "b": 2, "c": 3.5}),
     ({"a": 1, "b": 1, "c": 1}, 2, {"a": 2 / 3, "b": 2 / 3, "c": 2 / 3}), ({"b": 1}, 2, {"a": 0})],
)  # fmt: skip
def test_seats_are_divided_evenly_and_none_is_left(
    demands: dict[str, int], seats: int, expected: dict[str, float]
) -> None:
    assert {tenant: fair_seats(demands, tenant, seats) for tenant in expected} == pytest.approx(expected)
