"""Tells the person at the terminal what happens in the cluster."""

from __future__ import annotations

import time

from rich.console import Console

from cluster.control.view import View


class Watch:
    """Prints a line when a process is lost and one when it is back."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pids: dict[str, int] = {}
        self._lost: dict[str, float] = {}

    def see(self, view: View) -> None:
        """Compare with the views seen before. Who is in none has left the fleet: another one of its name is new."""
        for gone in (self._pids.keys() | self._lost.keys()) - {member.id for member in view.members}:
            self._pids.pop(gone, None)
            self._lost.pop(gone, None)
        for member in view.members:
            known = self._pids.get(member.id, member.pid)
            if (member.state == "lost" or known != member.pid) and member.id not in self._lost:
                self._lost[member.id] = time.monotonic()
                self._say(f"[yellow]{member.id} is lost[/] (process {known}); Ray starts it again")
            if member.state == "ready":
                if (since := self._lost.pop(member.id, None)) is not None:
                    self._say(f"[green]{member.id} is back[/] {time.monotonic() - since:.1f} s later")
                self._pids[member.id] = member.pid

    def _say(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False)
