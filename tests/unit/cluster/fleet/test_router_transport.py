"""Catches a transport that is not the configured one, or collective rows on a GPU that the other end does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.config import Config
from cluster.fleet.router_transport import Shell, reach
from cluster.models.random import SMALL, write_random
from tests.credentials import CREDENTIALS
from workers.checkpoint import Checkpoint
from workers.device import rows_device
from workers.transport.collective.client import CollectiveTransport
from workers.transport.grpc.client import GrpcTransport


@pytest.mark.parametrize(
    ("transport", "kind", "steps"),
    [("grpc", GrpcTransport, (None,)), ("shm", GrpcTransport, ("shm", None)),
     ("collective", CollectiveTransport, (None,)),
     ("device", GrpcTransport, (None,))],
)  # fmt: skip
def test_the_way_is_the_configured_one(
    tmp_path: Path, transport: str, kind: type, steps: tuple[str | None, ...]
) -> None:
    write_random(tmp_path / "model", SMALL)
    config = Config(transport=transport, router_device="cpu", expert_device="cpu")  # type: ignore[arg-type]
    shell = Shell("router-0", "127.0.0.1", CREDENTIALS, int, lambda: None, lambda: None)
    reached = reach(config, Checkpoint(tmp_path / "model"), shell)
    assert isinstance(reached.transport, kind)
    assert (None if reached.step_way is None else reached.step_way.name) in steps
    assert (reached.collective is reached.transport, bool(reached.store_address)) == ((transport == "collective"),) * 2
    assert reached.rows_on == "cpu"
    reached.transport.close()


def test_collective_rows_lie_on_gpus_where_both_ends_have_one() -> None:
    gpu = torch.device("cuda", 0)
    assert rows_device(gpu, "cuda", "cuda") == gpu
    assert rows_device(gpu, "cuda", "cpu") == rows_device(torch.device("cpu"), "cpu", "cuda") == torch.device("cpu")
