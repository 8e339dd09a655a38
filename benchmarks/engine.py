"""`python -m benchmarks.engine`: our engine beside transformers and others on one checkpoint, alternating."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import peers
from benchmarks.child import Child, ChildRunner
from benchmarks.command import run
from benchmarks.workload import DECODE_BATCHES, PREFILL_TOKENS, RANDOM_200M, Runner
from cluster.bench.common import Run, alternate, cache_directory, console, machine, print_json, print_table
from cluster.models.random import write_random
from workers.kernels.threads import process_environment

OURS, REFERENCE, CLUSTER, OVER_GRPC = "expertmesh", "transformers", "expertmesh cluster", "expertmesh cluster, gRPC"


def engine(
    model: Annotated[
        Path | None, typer.Option(help="checkpoint directory; default: a random one of 200 million parameters")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs per figure, of which the median counts")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each engine; 0: all cores")] = 0,
    cluster: Annotated[
        bool, typer.Option(help="also our engine over two expert worker processes, by shared memory and by gRPC")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokens per second of decode and prefill in one process, beside transformers and what else is installed."""
    directory = model or random_model()
    n_threads = threads or len(os.sched_getaffinity(0))
    figures, notes = measure(directory, repeats, n_threads, cluster)
    result: dict[str, Any] = {
        "model": str(directory), "machine": machine(), "threads": n_threads, "repeats": repeats,
        "tokens_per_second": figures, "ratios": ratios(figures), "notes": notes,
    }  # fmt: skip
    if as_json:
        print_json(result)
    else:
        show(figures, notes)


def random_model() -> Path:
    """The default checkpoint, made once."""
    directory = cache_directory() / "bench" / "random-200m"
    if not directory.is_dir():
        console.print(f"writing a random model to {directory}", style="dim")
        directory.parent.mkdir(parents=True, exist_ok=True)
        write_random(directory, RANDOM_200M)
    return directory


def workloads(runners: Sequence[Runner]) -> dict[str, dict[str, Run]]:
    """What is measured, and the run of each engine that measures it."""
    runs: dict[str, dict[str, Run]] = {}
    for batch in DECODE_BATCHES:
        runs[f"decode_{batch}"] = {runner.name: partial(runner.decode, batch) for runner in runners}
    runs[f"prefill_{PREFILL_TOKENS}"] = {runner.name: partial(runner.prefill, PREFILL_TOKENS) for runner in runners}
    return runs


def measure(
    directory: Path, repeats: int, n_threads: int, cluster: bool
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Median tokens per second by workload and engine, and remarks."""
    with ExitStack() as stack:

        def child(name: str, kind: str, environment: Mapping[str, str]) -> Child:
            command = [sys.executable, "-m", "benchmarks.runner_process", kind, str(directory), str(n_threads)]
            process = Child(name, command, environment)
            stack.callback(process.close)
            return process

        ours = process_environment(n_threads)
        reference = child(REFERENCE, "transformers", {})
        children = [child(OURS, "expertmesh", ours), reference]
        if cluster:
            children += [child(CLUSTER, "shm", ours), child(OVER_GRPC, "grpc", ours)]
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        others, absent = stack.enter_context(peers.installed(directory, work, n_threads))
        runners = [*map(ChildRunner, children), *others]
        figures = {}
        for name, runs in workloads(runners).items():
            console.print(name, style="bold")
            figures[name] = alternate(runs, repeats)
        return figures, {REFERENCE: reference.ask(method="options")} | absent


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours by transformers', and the cluster's by our one process's."""
    result = {name: speeds[OURS] / speeds[REFERENCE] for name, speeds in figures.items()}
    for name, speeds in figures.items():
        if CLUSTER in speeds and name.startswith("decode"):
            result[f"cluster_{name}"] = speeds[CLUSTER] / speeds[OURS]
            result[f"grpc_cluster_{name}"] = speeds[OVER_GRPC] / speeds[OURS]
    return {name: round(value, 3) for name, value in result.items()}


def show(figures: dict[str, dict[str, float]], notes: dict[str, Any]) -> None:
    """The figures as a table, each with its ratio to transformers."""
    engines = list(next(iter(figures.values())))
    rows = [
        [name, *(f"{speeds[e]:.1f} ({speeds[e] / speeds[REFERENCE]:.2f}x)" for e in engines)]
        for name, speeds in figures.items()
    ]
    print_table("tokens per second (times transformers)", ["", *engines], rows)
    for name, note in notes.items():
        console.print(f"{name}: {note}", highlight=False)


if __name__ == "__main__":
    run(engine)
