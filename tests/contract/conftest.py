from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.contract.collective_harness import CollectiveStepWorkers, CollectiveWorkers, RowsApartWorkers
from tests.contract.device_harness import StepWorkers
from tests.contract.harness import GrpcWorkers, LocalWorkers, ShmWorkers, Workers
from tests.contract.model import Model

KINDS: dict[str, Callable[[Model], Workers]] = {
    "local": LocalWorkers,
    "grpc": GrpcWorkers,
    "shm": ShmWorkers,
    "collective": CollectiveWorkers,
    "collective, rows apart": RowsApartWorkers,
    "collective, whole steps": CollectiveStepWorkers,
    "device": StepWorkers,
}


@pytest.fixture(params=list(KINDS))
def make_workers(request: pytest.FixtureRequest) -> Iterator[Callable[[Model], Workers]]:
    """Makes workers behind each transport in turn; every test of the contract runs once for each."""
    made: list[Workers] = []

    def make(model: Model) -> Workers:
        made.append(KINDS[request.param](model))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


@pytest.fixture
def workers() -> Iterator[GrpcWorkers]:
    """One worker, `a`, that holds every expert, over gRPC."""
    workers = GrpcWorkers(Model())
    workers.start("a", [(layer, expert) for layer in range(2) for expert in range(6)])
    yield workers
    workers.close()
