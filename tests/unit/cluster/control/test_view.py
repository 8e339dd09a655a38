"""Catches a router that is ready before the workers of its placement answer, or never again once one drains."""

from __future__ import annotations

import pytest

from cluster.control.view import Member, State, View
from cluster.placement.placement import striped


@pytest.mark.parametrize(
    ("state", "complete"), [("starting", False), ("ready", True), ("draining", True), ("lost", False)]
)
def test_a_view_is_complete_once_every_worker_answers(state: State, complete: bool) -> None:
    members = tuple(Member("expert", f"expert-{i}", i, "n", s, "127.0.0.1:3") for i, s in enumerate(("ready", state)))
    assert View(1, members, striped(1, 2, ("expert-0", "expert-1"))).complete is complete
