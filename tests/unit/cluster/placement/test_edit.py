"""Catches a change that loses an expert, shares that do not add up, and an error that does not say what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.errors import PlacementError
from cluster.placement.edit import check, drop, move, replicate
from cluster.placement.placement import Placement, striped

START = striped(2, 4, ("a", "b"))


def test_a_replica_comes_moves_and_goes() -> None:
    two = replicate(START, 1, 2, "c")
    assert (two.epoch, two.workers, two.holders(1, 2), two.share(1, 2)) == (2, ("a", "b", "c"), ("b", "c"), (0.5, 0.5))
    moved = move(two, 1, 2, "b", "a")
    assert (moved.epoch, moved.holders(1, 2)) == (3, ("a", "c"))
    one = drop(moved, 1, 2, "c")
    assert (one.holders(1, 2), one.share(1, 2)) == (("a",), (1.0,))
    assert one.all_replicas() == move(START, 1, 2, None, "a").all_replicas()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda: replicate(START, 0, 0, "a"), "already"),
        (lambda: drop(START, 0, 0, "a"), "only replica"),
        (lambda: drop(START, 0, 0, "b"), "those are on a"),
        (lambda: move(START, 2, 0, None, "b"), "layers are 0 to 1"),
        (lambda: move(START, 0, 4, None, "b"), "experts are 0 to 3"),
        (lambda: move(replicate(START, 0, 0, "b"), 0, 0, None, "c"), "say which of them"),
        (lambda: check(START, {"a": 0}), "no expert worker b; there are a"),
        (lambda: check(START, {"a": 4, "b": 3}), "b has room for 3 experts and would hold 4"),
        (lambda: check(Placement(1, ("a",), (((),),)), {"a": 0}), "layer 0, expert 0 would have no replica"),
        (lambda: check(Placement(1, ("a",), (((0, 0),),)), {"a": 0}), "two replicas on one worker"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(change: Callable[[], object], error: str) -> None:
    with pytest.raises(PlacementError, match=error):
        change()


def test_who_has_more_than_there_is_room_for_may_keep_or_lose_it() -> None:
    """Would catch a fleet in which nothing can be moved any more after a drain was undone and room shrank."""
    before = striped(2, 4, ["a", "b"])
    slots = {"a": 3, "b": 3}
    check(move(before, 0, 0, "a", "b"), {"a": 3, "b": 5}, before)
    with pytest.raises(PlacementError, match="b has room for 3 experts and would hold 5"):
        check(move(before, 0, 0, "a", "b"), slots, before)
    check(before.numbered(2), slots, before)
    with pytest.raises(PlacementError, match="a has room for 3 experts and would hold 4"):
        check(before, slots)
