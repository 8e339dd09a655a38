"""`python -m benchmarks.exchange`: what dispatch + combine cost beside bare gRPC streams that echo the same bytes.

`echo` returns every frame as it comes, so that the two directions of a message of several frames overlap. An expert
needs all its rows first: `stored` returns the frames once the last one has come.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from benchmarks import transports
from benchmarks.child import Child
from benchmarks.command import run
from cluster.bench.common import console, machine, print_json, print_table
from cluster.errors import StartError
from workers.kernels.threads import process_environment

_SIZES = (2 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
_RUN_BYTES = 64 << 20  # a run moves about this much, in at least _FEWEST and at most _MOST round trips
_FEWEST, _MOST = 4, 500
_WAYS = ("exchange", "echo", "stored")
_COMMAND = (sys.executable, "-m", "benchmarks.exchange_process")


def exchange(
    repeats: Annotated[int, typer.Option(min=1, help="runs of each way, in turn; the median counts")] = 5,
    transport: Annotated[
        Literal["shm", "grpc", "collective", "all"],
        typer.Option(help="shm, grpc: beside gRPC echoes; collective, all: 1+2 and 2+4 processes, bare all-to-alls"),
    ] = "shm",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Round trips of 2 KiB to 16 MiB of float32 rows to expert workers whose experts cost nothing."""
    if transport in ("collective", "all"):
        ways = ("grpc", "collective") if transport == "all" else (transport,)
        layouts = transports.compare(ways, _SIZES, repeats)
        if as_json:
            print_json({"machine": machine(), "repeats": repeats, "layouts": layouts})
        else:
            transports.show(layouts, ways)
        return
    with _server("worker") as worker, _server("echo") as echo:
        client = Child("client", (*_COMMAND, "client", worker, echo, transport), process_environment(1))
        try:
            rows = [_measure(client, n_bytes, repeats) for n_bytes in _SIZES]
        finally:
            client.close()
    ratios = {way: {_name(row["bytes"]): row["exchange_us"] / row[f"{way}_us"] for row in rows} for way in _WAYS[1:]}
    if as_json:
        report = {"machine": machine(), "repeats": repeats, "sizes": rows}
        print_json(report | {"ratios": ratios["echo"], "stored_ratios": ratios["stored"]})
    else:
        _show(rows, ratios)


def _measure(client: Child, n_bytes: int, repeats: int) -> dict[str, Any]:
    trips = min(_MOST, max(_FEWEST, _RUN_BYTES // n_bytes))
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    for turn in range(repeats):
        console.print(f"  {_name(n_bytes)}: run {turn + 1} of {repeats}", style="dim", highlight=False)
        for way in _WAYS:
            figures[way].append(client.ask(way=way, n_bytes=n_bytes, trips=trips))
    row: dict[str, Any] = {"bytes": n_bytes}
    for way in _WAYS:
        seconds = statistics.median(figure["seconds"] for figure in figures[way])
        row[f"{way}_us"] = seconds * 1e6
        row[f"{way}_cpu_us"] = statistics.median(figure["cpu_seconds"] for figure in figures[way]) * 1e6
        row[f"{way}_round_trips_per_s"] = 1 / seconds
        row[f"{way}_bytes_per_s"] = 2 * n_bytes / seconds
    return row


@contextmanager
def _server(role: str) -> Iterator[str]:
    """The address of a server in a process of its own, which ends with the context."""
    environment = os.environ | process_environment(1)
    command = (*_COMMAND, role)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise StartError(f"the {role} of the benchmark ended with exit code {process.wait()}")
        yield address


def _show(rows: list[dict[str, Any]], ratios: dict[str, dict[str, float]]) -> None:
    header = ("bytes each way", "µs", "echo µs", "ratio", "stored µs", "ratio", "MB/s", "router CPU µs", "echo CPU µs")
    lines = []
    for row in rows:
        name = _name(row["bytes"])
        cells = [name, f"{row['exchange_us']:.0f}"]
        for way, ratio in ratios.items():
            cells += [f"{row[f'{way}_us']:.0f}", f"{ratio[name]:.2f}"]
        figures = (row["exchange_bytes_per_s"] / 1e6, row["exchange_cpu_us"], row["echo_cpu_us"])
        lines.append((*cells, *(f"{figure:.0f}" for figure in figures)))
    print_table("dispatch + combine beside bare gRPC echoes", header, lines)


def _name(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"


if __name__ == "__main__":
    run(exchange)
