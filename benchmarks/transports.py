"""`python -m benchmarks.exchange --transport collective|all`: the transports side by side, beside bare all-to-alls."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from benchmarks.child import Child
from cluster.bench.common import console, print_table
from workers.kernels.threads import process_environment

LAYOUTS = ((1, 2), (2, 4))  # routers, expert workers
BARE = "bare"
_RUN_BYTES = 32 << 20
_FEWEST, _MOST = 4, 200


def compare(ways: Sequence[str], sizes: Sequence[int], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """By layout, for each number of bytes that a router sends and gets back: microseconds by way, ratios to bare."""
    return {f"{routers}+{workers}": _layout(routers, workers, ways, sizes, repeats) for routers, workers in LAYOUTS}


def _layout(
    n_routers: int, n_workers: int, ways: Sequence[str], sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    command = (sys.executable, "-m", "benchmarks.transport_process")
    counts = (str(n_routers), str(n_workers))
    with ExitStack() as stack:
        ranks = []
        for rank in range(n_routers + n_workers):
            ranks.append(Child(f"rank {rank}", (*command, str(rank), *counts), process_environment(1)))
            stack.callback(ranks[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor(len(ranks)))

        def ask(**request: Any) -> list[Any]:
            return list(pool.map(lambda rank: rank.ask(**request), ranks))

        ask(do="join", members=ask(do="describe"))
        rows = []
        for n_bytes in sizes:
            figures: dict[str, list[float]] = {way: [] for way in (*ways, BARE)}
            trips = min(_MOST, max(_FEWEST, _RUN_BYTES // n_bytes))
            console.print(f"  {n_routers}+{n_workers}, {n_bytes >> 10} KiB", style="dim", highlight=False)
            for _ in range(repeats):
                for way, seconds in figures.items():
                    seconds.append(max(ask(do="run", way=way, n_bytes=n_bytes, trips=trips)))
            rows.append({"bytes": n_bytes} | _row(figures))
        return rows


def _row(figures: dict[str, list[float]]) -> dict[str, float]:
    medians = {way: statistics.median(seconds) for way, seconds in figures.items()}
    times = {f"{way}_us": 1e6 * seconds for way, seconds in medians.items()}
    return times | {f"{way}_ratio": seconds / medians[BARE] for way, seconds in medians.items() if way != BARE}


def show(layouts: dict[str, list[dict[str, Any]]], ways: Sequence[str]) -> None:
    """A table for each layout."""
    for layout, rows in layouts.items():
        header = ["KiB each way and router", "bare all-to-all µs"]
        for way in ways:
            header += [f"{way} µs", "ratio"]
        lines = []
        for row in rows:
            cells = [f"{row['bytes'] >> 10}", f"{row[f'{BARE}_us']:.0f}"]
            for way in ways:
                cells += [f"{row[f'{way}_us']:.0f}", f"{row[f'{way}_ratio']:.2f}"]
            lines.append(cells)
        print_table(f"dispatch + combine, {layout} routers + expert workers", header, lines)
