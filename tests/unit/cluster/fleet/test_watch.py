"""Catches a terminal that hides a loss, or tells of one where a process left on purpose."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.control.view import Member, State, View
from cluster.fleet.watch import Watch
from cluster.placement.placement import striped

Fleet = dict[str, tuple[int, State]]


def told(*fleets: Fleet) -> list[str]:
    """What the terminal says of fleets seen one after another; each says the pid and the state of routers."""
    console = Console(width=100, file=io.StringIO(), record=True)
    watch = Watch(console)
    for version, fleet in enumerate(fleets):
        members = tuple(Member("router", name, pid, "n", state, "") for name, (pid, state) in fleet.items())
        watch.see(View(version, members, striped(1, 1, ("expert-0",))))
    return [line.partition(" ")[2] for line in console.export_text().splitlines()]


def test_a_loss_is_told_once_and_so_is_its_end() -> None:
    lost: Fleet = {"router-0": (1, "lost")}
    said = told({"router-0": (1, "ready")}, lost, lost, {"router-0": (2, "ready")})
    assert said[0] == "router-0 is lost (process 1); Ray starts it again"
    assert said[1].startswith("router-0 is back") and len(said) == 2
    assert told({"router-0": (1, "ready")}, {"router-0": (2, "ready")})[0] == said[0], "it was back before anybody saw"


def test_a_router_that_left_and_one_of_its_name_that_came_later_are_no_loss() -> None:
    one: Fleet = {"router-0": (1, "ready")}
    both: Fleet = {**one, "router-1": (2, "ready")}
    assert told(both, one, {**one, "router-1": (3, "ready")}) == []
    assert told(both, {**one, "router-1": (2, "lost")}, one, {**one, "router-1": (3, "ready")}) == [
        "router-1 is lost (process 2); Ray starts it again"
    ]
