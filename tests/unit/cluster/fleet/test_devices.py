"""Catches a cluster that starts and then dies for want of memory, or leaves GPUs idle: who gets how much of what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import Config
from cluster.errors import StartError
from cluster.fleet.devices import Needs, arrange, kinds
from workers.device import Gpu

GIB = 2**30
# Mixtral 8x7B in bfloat16: 45 billion parameters of experts, 1.6 of everything else, 128 KiB of KV a token.
MIXTRAL = Needs(experts=84 * GIB, n_experts=8, dense=3 * GIB, work=GIB, kv_block=16 * 128 * 2**10)
TINY = Needs(experts=300 * 2**20, n_experts=8, dense=100 * 2**20, work=GIB // 4, kv_block=2**20)


def cards(n: int, gib: int, used: int = 0) -> tuple[Gpu, ...]:
    return tuple(Gpu(index, "card", gib * GIB, (gib - used) * GIB, 3 * 10**12) for index in range(n))


def settled(config: Config, gpus: tuple[Gpu, ...], needs: Needs = MIXTRAL) -> Config:
    return arrange(kinds(config, gpus), gpus, needs)[0]


def test_without_gpus_all_is_as_it_was() -> None:
    config = settled(Config(), ())
    assert (config.router_device, config.expert_device) == ("cpu", "cpu")
    assert (config.expert_workers, config.kv_cache_mb) == (2, 512)
    assert config.gpus_per_router == config.gpus_per_expert_worker == 0
    assert settled(Config(expert_workers=5, kv_cache_mb=7), ()).expert_workers == 5


def test_one_gpu_holds_everything_and_the_cache_takes_what_is_left() -> None:
    config = settled(Config(), cards(1, 141))
    assert (config.expert_workers, config.gpus_per_router, config.router_device) == (0, 1.0, "cuda")
    left = 141 * 0.9 - 84 - 3 - 1 - 1  # experts, dense, step, CUDA itself
    assert config.kv_cache_mb == pytest.approx(left * 1024, abs=2)
    assert settled(Config(kv_cache_mb=100), cards(1, 141)).kv_cache_mb == 100


def test_each_process_gets_a_gpu_of_its_own_where_there_are_enough() -> None:
    config = settled(Config(), cards(4, 80))
    assert (config.expert_workers, config.gpus_per_router, config.gpus_per_expert_worker) == (3, 1.0, 1.0)
    assert settled(Config(routers=2), cards(8, 80)).expert_workers == 6
    assert settled(Config(), cards(16, 80)).expert_workers == 8, "more workers than experts a layer"


def test_processes_that_share_a_gpu_get_what_their_weights_need() -> None:
    config, uses = arrange(kinds(Config(expert_workers=2), cards(1, 141)), cards(1, 141), MIXTRAL)
    assert config.gpus_per_router + 2 * config.gpus_per_expert_worker <= 1
    assert config.gpus_per_expert_worker * 141 * 0.9 >= 43  # half of the experts and CUDA
    assert sum(use.count * use.budget for use in uses) <= 141 * GIB * 0.9
    assert {use.role for use in uses} == {"router", "expert worker"}
    assert "2 x expert worker" in str(uses[0])


@pytest.mark.parametrize(("n_gpus", "gib"), [(2, 80), (3, 44)])
def test_a_router_shares_a_gpu_where_the_experts_need_all_of_them(n_gpus: int, gib: int) -> None:
    """On two cards of 80 GiB experts alone need more than one."""
    config, uses = arrange(kinds(Config(), cards(n_gpus, gib)), cards(n_gpus, gib), MIXTRAL)
    assert config.expert_workers == n_gpus
    assert config.gpus_per_expert_worker > 0.5, "two workers might get one GPU"
    assert config.gpus_per_router + config.gpus_per_expert_worker <= 1
    assert config.kv_cache_mb > 1024
    assert all(use.weights + use.work + use.kv_cache <= use.budget for use in uses)
    assert settled(config, cards(n_gpus, gib)) == config


def test_cards_without_kernels_are_refused_before_anything_starts() -> None:
    old, older = (replace(cards(1, 80)[0], capability=capability, name="GPU") for capability in ((8, 0), (7, 5)))
    assert kinds(Config(), (old,)).router_device == "cuda"
    with pytest.raises(StartError, match=r"capability 8\.0, and products of 8 bits need 8\.9"):
        kinds(Config(expert_dtype="fp8"), (old,))
    with pytest.raises(StartError, match=r"capability 7\.5, and kernels need 8\.0"):
        kinds(Config(), (old, older))
    assert kinds(Config(router_device="cpu", expert_device="cpu"), (older,)).router_device == "cpu"


def test_eight_bits_are_proposed_where_they_help() -> None:
    needs = replace(MIXTRAL, experts_8=42 * GIB)
    for config, gpus in ((Config(), cards(1, 80)), (Config(expert_workers=1), cards(2, 80))):
        with pytest.raises(StartError, match="--expert-dtype fp8"):
            settled(config, gpus, needs)


def test_experts_on_cpus_behind_a_router_on_a_gpu() -> None:
    config = settled(Config(expert_device="cpu"), cards(1, 24))
    assert (config.router_device, config.expert_workers, config.gpus_per_expert_worker) == ("cuda", 2, 0)


def test_what_others_hold_of_a_gpu_is_not_planned_with() -> None:
    free, shared = settled(Config(), cards(1, 141)), settled(Config(), cards(1, 141, used=10))
    assert free.kv_cache_mb - shared.kv_cache_mb == pytest.approx(10 * 1024, abs=2)


@pytest.mark.parametrize(
    ("config", "gpus", "change"),
    [
        (Config(expert_workers=1), cards(4, 80), "--expert-workers 2"),
        (Config(expert_workers=2), cards(3, 24), "5 GPUs like these for the experts"),
        (Config(expert_workers=0), cards(3, 80), "--expert-workers 2"),
        (Config(expert_workers=0), cards(1, 80), "a GPU with more memory"),
        (Config(expert_workers=2, kv_cache_mb=100_000), cards(3, 80), "--kv-cache-mb 6"),
        (Config(expert_workers=3, gpus_per_router=1.0, gpus_per_expert_worker=1.0), cards(2, 80), "need 4 GPUs"),
    ],
)
def test_what_does_not_fit_names_the_smallest_change(config: Config, gpus: tuple[Gpu, ...], change: str) -> None:
    with pytest.raises(StartError, match=change):
        settled(config, gpus)


def test_a_gpu_that_is_asked_for_and_missing_is_named() -> None:
    with pytest.raises(StartError, match="expert_device is cuda, but this machine shows no GPU"):
        kinds(Config(expert_device="cuda"), ())


def test_what_was_settled_is_settled() -> None:
    """A configuration goes to actors, which look at it again."""
    for gpus in (cards(1, 141), cards(4, 80), cards(2, 80)):
        for needs in (MIXTRAL, TINY):
            config = settled(Config(), gpus, needs)
            assert settled(replace(config), gpus, needs) == config
