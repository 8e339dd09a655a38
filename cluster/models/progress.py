"""A progress bar for what takes seconds, on standard error: standard output stays for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.models.upcycle import Progress as Report


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A function to call with (what is being done, fraction of it done); each `what` gets a line of its own."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(what: str, fraction: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"{title}: {what}", total=1.0)
            bar.update(tasks[what], completed=fraction)

        yield report
