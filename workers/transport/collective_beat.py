"""Signs of life within a group: who is dead or hangs is noticed within the deadline, also while there is no work.

Workers beat, routers listen. A worker that computes for long still beats, so that slow is told from dead; and a beat
goes only when its router asks for it, so that the worker notices a router that hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from workers.transport.collective_mesh import Broken, Lane, Mesh


def listen(mesh: Mesh, first_s: float, deadline_s: float) -> Iterator[None]:
    """Yields each time every worker has beaten once more. The first beats may take `first_s`.

    Raises Broken, with the worker's name, when one is gone or silent for `deadline_s`.
    """
    blocks = {worker: torch.empty(1, dtype=torch.uint8) for worker in mesh.workers}
    due = {worker: mesh.receive(worker, Lane.BEAT, block) for worker, block in blocks.items()}
    timeout_s = first_s
    while True:
        for worker, block in blocks.items():
            _wait(mesh, worker, due[worker], timeout_s)
            due[worker] = mesh.receive(worker, Lane.BEAT, block)
        timeout_s = deadline_s
        yield


def beat(mesh: Mesh, routers: Callable[[], Collection[int]], first_s: float, deadline_s: float) -> None:
    """Beat four times a deadline for all of `routers()`, until there are none or the mesh has ended.

    Raises Broken, with the router's name, when one is gone or takes no beat for `deadline_s`.
    """
    block = torch.zeros(1, dtype=torch.uint8)
    timeout_s = first_s
    while not mesh.ended.is_set() and (present := routers()):
        sent = {router: mesh.send(router, Lane.BEAT, block) for router in present}
        for router, work in sent.items():
            try:
                _wait(mesh, router, work, timeout_s)
            except Broken:
                if router in routers():
                    raise
        timeout_s = deadline_s
        mesh.ended.wait(deadline_s / 4)


def _wait(mesh: Mesh, rank: int, work: object, timeout_s: float) -> None:
    try:
        mesh.wait(work, timeout_s)
    except Broken as broken:
        raise Broken(f"{mesh.name(rank)}: {broken}") from None
