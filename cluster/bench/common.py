"""What the benchmarks share: alternating runs, medians, tables, one JSON object."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Run = Callable[[], float]

console = Console(stderr=True)


def alternate(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """The median of each run's figures.

    The runs take turns, so that whatever else the machine does meets them alike; a first turn that warms up is
    thrown away.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            console.print(f"  {name}: run {turn} of {repeats}", style="dim", highlight=False)
            figures[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in figures.items()}


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column left, the others right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_json(result: Mapping[str, Any]) -> None:
    """One object on standard output."""
    print(json.dumps(result, indent=2))


def cache_directory() -> Path:
    """Where models made for benchmarks are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "expertmesh"
