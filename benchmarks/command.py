"""A benchmark as a command: `python -m benchmarks.NAME`, with `--help`, and one line for an error made on purpose."""

from __future__ import annotations

from collections.abc import Callable

import typer

from cluster.errors import ExpertMeshError


def run(benchmark: Callable[..., None]) -> None:
    """Call it with the options of the command line; an ExpertMeshError ends the process with its sentence."""
    try:
        typer.run(benchmark)
    except ExpertMeshError as error:
        raise SystemExit(f"error: {error}") from error
