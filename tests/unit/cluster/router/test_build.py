"""An engine from a directory: what it reads, what it needs, and what it says when that is not there."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cluster.config import Config
from cluster.errors import CheckpointError, StartError
from cluster.models.random import SMALL, write_random
from cluster.router import memory
from cluster.router.build import build_engine, dense_bytes
from cluster.router.params import SamplingParams
from cluster.router.sizing import context_limit, expert_bytes, pool_blocks
from workers.checkpoint import Checkpoint
from workers.host_memory import available_bytes
from workers.kernels import select
from workers.kernels.select import formats_for
from workers.shard import ExpertShard, load_shard
from workers.weights import FORMATS

CONFIG = Config(kv_cache_mb=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    write_random(path)
    return path


def answer(directory: Path, experts: ExpertShard | None) -> list[int]:
    engine = build_engine(CONFIG, directory, experts)
    engine.submit("x", [1, 2, 3], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    return [token for _ in range(8) for output in engine.step() for token in output.token_ids]


def test_experts_may_be_here_or_given(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    every = product(range(checkpoint.spec.n_layers), range(checkpoint.spec.n_experts))
    given = load_shard(checkpoint, every, torch.float32)
    assert answer(directory, given) == answer(directory, None)
    assert sum(slot.rows for slot in given.slots) > 0


def test_the_bytes_asked_for_are_the_bytes_read(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    checkpoint.dense(torch.float32)
    assert checkpoint.bytes_read == dense_bytes(checkpoint, torch.float32)
    checkpoint.expert(1, 3, FORMATS["float32"])
    expert = expert_bytes(checkpoint, torch.float32)
    assert checkpoint.bytes_read == dense_bytes(checkpoint, torch.float32) + expert


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_16_bits_asks_for_half_the_memory(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less would be a kill while loading, more a refusal without need."""
    write_random(tmp_path / "model", replace(SMALL, dtype=dtype))
    checkpoint = Checkpoint(tmp_path / "model")
    spec, norms = checkpoint.spec, (2 * checkpoint.spec.n_layers + 1) * checkpoint.spec.hidden_size
    expert = 3 * spec.hidden_size * spec.ffn_size
    assert expert_bytes(checkpoint, torch.float32) == 2 * expert
    dense = checkpoint.dense(torch.float32, formats_for("cpu", torch.float32))
    held = {id(tensor): tensor.nbytes for tensor in (dense.embed_VD, dense.norm_D, dense.head_VD)}
    parts = [getattr(layer, field.name) for layer in dense.layers for field in fields(layer)]
    held |= {id(part): part.nbytes for part in parts if part is not None}
    assert dense_bytes(checkpoint, torch.float32) == sum(held.values()) == checkpoint.bytes_read + 2 * norms
    assert expert_bytes(checkpoint, torch.float32, "cpu", "float32") == 4 * expert
    assert expert_bytes(checkpoint, torch.bfloat16, "cuda", "fp8") == expert + 4 * (
        2 * spec.ffn_size + spec.hidden_size
    )
    with pytest.raises(StartError, match="on a cpu device keep weights in float32, bfloat16, float16; name one"):
        expert_bytes(checkpoint, torch.float32, "cpu", "fp8")
    monkeypatch.setattr(select, "usable", lambda: False)
    assert expert_bytes(checkpoint, torch.float32) == 4 * expert
    assert dense_bytes(checkpoint, torch.float32) == 2 * checkpoint.bytes_read


def test_a_defect_is_told_before_memory_is_asked_for(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(CheckpointError, match="safetensors"):
        build_engine(Config(kv_cache_mb=10**9), tmp_path)


def test_too_little_memory_is_told_with_both_sizes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 200 * 2**20)
    with pytest.raises(StartError, match=r"not enough memory: 258 MiB needed .*KV cache 1 MiB.*, 200 MiB available"):
        build_engine(CONFIG, directory)


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 1000), ("600", 350), ("5000", 1000), ("100", 0)], ids=lambda value: str(value)
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_bytes(tmp_path) == 1000  # no such files
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 30\nactive_file 20\n")
    assert available_bytes(tmp_path) == expected


def test_the_longest_sequence_is_what_all_limits_allow(directory: Path) -> None:
    spec = Checkpoint(directory).spec
    n_blocks = pool_blocks(CONFIG, spec, torch.float32)
    assert n_blocks * 16 * 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * 4 <= 2**20
    assert context_limit(CONFIG, spec, 10**6) == spec.max_context
    assert context_limit(Config(max_context=77), spec, 10**6) == 77
    assert context_limit(Config(max_context=77), spec, 4) == 65
    with pytest.raises(StartError, match="one block of 4096 tokens"):
        pool_blocks(Config(kv_cache_mb=1, block_size=4096), spec, torch.float32)


def test_the_last_token_of_the_longest_sequence_needs_no_block(directory: Path) -> None:
    engine = build_engine(Config(kv_cache_mb=1, max_context=0), directory)
    longest = engine.max_context
    engine.submit("x", [1] * (longest - 3), SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    tokens = []
    while engine.has_work():
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert len(tokens) == 3
