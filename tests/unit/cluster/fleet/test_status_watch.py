"""Catches a live view that spoils the terminal, dies with the controller, or shows other numbers than it was told."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import ExpertMeshError
from cluster.fleet.status_watch import picture, watch
from tests.terminal import run_in_terminal
from tests.unit.cluster.gateway.page.fake_source import FakeSource


def seen(source: FakeSource) -> dict[str, Any]:
    return asyncio.run(source.observe(0, 0))


def test_the_picture_says_what_was_seen() -> None:
    source = FakeSource((8, 8, 12))
    source.states["expert-3"] = "lost"
    source.events.add("chaos", "kill -9 expert-3", level="warning")
    look = seen(source)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(picture("tiny at http://x", look, look["events"][-8:], "the controller does not answer"))
    text = console.export_text()
    assert f"imbalance {look['imbalance']:.3f}" in text and "epoch 1" in text
    workers = [line.split()[:2] for line in text.splitlines() if line.startswith("expert-")]
    assert workers[2:4] == [["expert-2", "ready"], ["expert-3", "lost"]] and workers[-1][0] == "expert-11"
    row = next(member for member in look["members"] if member["id"] == "expert-2")
    assert f"{row['rows'] / 60:,.0f}" in text and "6 running, 1 waiting, 32% of the KV cache used" in text
    assert "kill -9 expert-3" in text and "this is from before" in text


def test_ctrl_c_leaves_the_terminal_as_it_was_and_a_lost_controller_is_waited_for() -> None:
    source, out, looks = FakeSource((3, 4, 2)), io.StringIO(), iter(range(99))

    def look(epoch: int, event: int) -> dict[str, Any]:
        match next(looks):
            case 1:
                raise ExpertMeshError("the controller at x does not answer")
            case 4:
                raise KeyboardInterrupt
        return asyncio.run(source.observe(epoch, event))

    watch("tiny", look, Console(file=out, force_terminal=True, width=100, height=40), interval_s=0.0)
    text = out.getvalue()
    assert "does not answer; this is from before" in text
    assert text.index("\x1b[?1049h") < text.index("expert-1") < text.rindex("\x1b[?1049l"), (
        "the screen from before is back"
    )
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown"


def test_it_needs_a_terminal() -> None:
    with pytest.raises(ExpertMeshError, match="needs a terminal"):
        watch("tiny", lambda epoch, event: {}, Console(file=io.StringIO()))


PROGRAM = """
import asyncio
from rich.console import Console
from cluster.fleet.status_watch import watch
from tests.unit.cluster.gateway.page.fake_source import FakeSource
source = FakeSource((3, 4, 2))
watch("tiny", lambda epoch, event: asyncio.run(source.observe(epoch, event)), Console(), interval_s=0.05)
"""


def test_in_a_real_terminal() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    shown = run_in_terminal(sys.executable, "-c", PROGRAM, environ=environ, until="expert-1 is ready")
    assert shown.rindex("\x1b[?1049l") > shown.rindex("expert-1") and "Traceback" not in shown
