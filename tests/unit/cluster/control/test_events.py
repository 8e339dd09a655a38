"""Catches comings and goings that are told twice, not at all, or as a fault when they were meant."""

from __future__ import annotations

from cluster.control.events import Events
from cluster.control.view import Member


def member(id: str, state: str = "ready", pid: int = 1) -> Member:
    return Member("expert", id, pid, "node", state, "x:1")  # type: ignore[arg-type]


def test_each_coming_and_going_is_told_once() -> None:
    now = [1000.0]
    events = Events(lambda: now[0])
    views = [
        [member("expert-0", "starting"), member("expert-1")],
        [member("expert-0"), member("expert-1")],
        [member("expert-0"), member("expert-1", "lost")],
        [member("expert-0"), member("expert-1", "lost")],
        [member("expert-0"), member("expert-1", "starting", pid=2)],
        [member("expert-0"), member("expert-1", pid=2)],
        [member("expert-0", pid=3), member("expert-1", "draining", pid=2)],  # came back between two looks
        [member("expert-0", pid=3)],
    ]
    for view in views:
        events.see(view)
        events.see(view)
        now[0] += 1
    told = [(event.level, event.text) for event in events.after(0)]
    assert told == [
        ("good", "expert-1 is ready (process 1)"),
        ("good", "expert-0 is ready (process 1)"),
        ("error", "expert-1 is lost (process 1)"),
        ("good", "expert-1 is back after 3.0 s (process 2)"),
        ("error", "expert-0 is lost (process 1)"),
        ("good", "expert-0 is back after 0.0 s (process 3)"),
        ("warning", "expert-1 is draining"),
        ("info", "expert-1 has left the fleet"),
    ]


def test_a_worker_that_is_not_wanted_ends_without_an_alarm() -> None:
    events = Events()
    events.see([member("expert-0"), member("expert-1")], ["expert-0", "expert-1"])
    number = events.after(0)[-1].number
    events.see([member("expert-0"), member("expert-1", "lost")], ["expert-0"])
    events.see([member("expert-0")], ["expert-0"])
    assert [event.text for event in events.after(number)] == ["expert-1 has left the fleet"]


def test_numbers_rise_over_a_restart_and_the_ring_is_bounded() -> None:
    first = Events(lambda: 1000.0)
    for i in range(600):
        first.add("chaos", f"event {i}")
    kept = first.after(0)
    assert [kept[0].text, kept[-1].text] == ["event 100", "event 599"]
    assert not first.after(kept[-1].number)
    later = Events(lambda: 1001.0)
    later.add("chaos", "after the restart")
    assert later.after(kept[-1].number), "a restarted controller's events are newer than those it gave before"
