"""Catches a transport that does not suit the machine, or a choice without its reason."""

from __future__ import annotations

import pytest

from cluster.config import Config
from cluster.fleet.choose import choose


@pytest.mark.parametrize(
    ("config", "linked_gpus", "transport", "says"),
    [
        (Config(), False, "shm", "CPUs"),
        (Config(), True, "collective", "its own GPU"),
        (Config(expert_workers=0), True, "local", "one process"),
        (Config(ray_address="10.0.0.1:6379"), True, "shm", "not known"),
        (Config(transport="shm"), False, "shm", "as configured"),
        (Config(transport="grpc"), True, "grpc", "as configured"),
        (Config(transport="collective"), False, "collective", "as configured"),
        (Config(transport="local"), False, "local", "as configured"),
    ],
)
def test_what_suits_the_machine(config: Config, linked_gpus: bool, transport: str, says: str) -> None:
    choice = choose(config, linked_gpus=linked_gpus)
    assert choice.transport == transport
    assert says in choice.reason
