"""Catches a transport that does not suit the machine, or a choice without its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import Config
from cluster.fleet.choose import choose

ON_GPUS = Config(router_device="cuda", expert_device="cuda", expert_workers=2)


@pytest.mark.parametrize(
    ("config", "transport", "says"),
    [
        (Config(router_device="cpu", expert_device="cpu", expert_workers=2), "shm", "not both"),
        (replace(ON_GPUS, expert_device="cpu"), "shm", "not both"),
        (ON_GPUS, "device", "on GPUs"),
        (replace(ON_GPUS, expert_workers=0), "local", "one process"),
        (replace(ON_GPUS, transport="grpc"), "grpc", "as configured"),
        (replace(ON_GPUS, transport="shm"), "shm", "as configured"),
        (Config(transport="collective"), "collective", "as configured"),
        (Config(transport="local"), "local", "as configured"),
    ],
)
def test_what_suits_the_devices(config: Config, transport: str, says: str) -> None:
    choice = choose(config)
    assert choice.transport == transport
    assert says in choice.reason
