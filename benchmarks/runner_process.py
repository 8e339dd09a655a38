"""One engine of `benchmarks.engine` in a process of its own.

`python -m benchmarks.runner_process {expertmesh|shm|grpc|transformers} CHECKPOINT THREADS`; a request is
`{"method": "decode", "size": 16}`, the answer tokens per second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.child import serve
from benchmarks.workload import Runner
from workers.kernels.threads import worker_threads

N_WORKERS = 2


def start(stack: ExitStack, kind: str, directory: Path, threads: int) -> Callable[[dict[str, Any]], Any]:
    """Load the engine; the function that answers for it."""
    torch.set_num_threads(threads)
    runner = make_runner(stack, kind, directory, threads)

    def answer(request: dict[str, Any]) -> Any:
        if request["method"] == "options":
            return getattr(runner, "options", {})
        return getattr(runner, request["method"])(request["size"])

    return answer


def make_runner(stack: ExitStack, kind: str, directory: Path, threads: int) -> Runner:
    """What `kind` names; `stack` ends the processes it starts."""
    if kind == "transformers":
        from benchmarks.transformers_runner import Transformers

        return Transformers(directory)
    from benchmarks.engine_runner import EngineRunner
    from benchmarks.local_cluster import local_cluster
    from workers.transport.shm.router import ShmWay

    if kind in ("shm", "grpc"):
        ways = (ShmWay(),) if kind == "shm" else ()
        experts = stack.enter_context(local_cluster(directory, N_WORKERS, worker_threads(threads, N_WORKERS), ways))
        return EngineRunner(kind, directory, experts)
    return EngineRunner(kind, directory)


def main(kind: str, directory: str, threads: str) -> None:
    with ExitStack() as stack:
        serve(partial(start, stack, kind, Path(directory), int(threads)))


if __name__ == "__main__":
    main(*sys.argv[1:])
