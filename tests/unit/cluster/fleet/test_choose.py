"""Catches a transport that does not suit the machine, or a choice without its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import Config
from cluster.fleet.choose import Choice, choose
from workers.device import Gpu

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


def test_gpus_that_share_no_memory_go_on_to_nccl_where_the_network_may_be_used() -> None:
    near = Gpu(0, "NVIDIA H100", 80 << 30, 80 << 30, 3 * 10**12, "a")
    hosts, strange = (near, replace(near, host="b")), (replace(near, strangers=(1,)), replace(near, index=1))
    there = replace(ON_GPUS, collective_interface="eth0", trusted_network=True)
    assert choose(there, gpus=hosts) == Choice("collective", "NCCL: the GPUs are in 2 hosts")
    assert "GPU 0 does not reach the memory of GPU 1" in choose(there, gpus=strange).reason
    closed = choose(replace(there, trusted_network=False), gpus=hosts)
    assert closed.transport == "grpc"
    assert "in 2 hosts" in closed.reason and "--trusted-network" in closed.reason
    assert choose(there, gpus=(near, near)).transport == "device"
    assert choose(replace(there, expert_device="cpu"), gpus=hosts).transport == "shm"
