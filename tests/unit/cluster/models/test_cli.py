"""`expertmesh model ...`: the options reach the checkpoint, errors are one line on standard error and exit code 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cluster.models.cli import app
from cluster.models.default import NAME
from cluster.models.random import SMALL, of_family
from tests.tiny_llama import save_llama
from workers.checkpoint import Checkpoint


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, part: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and part in line


def test_random_defaults(tmp_path: Path) -> None:
    assert run("random", tmp_path / "m").exit_code == 0
    assert Checkpoint(tmp_path / "m").spec == SMALL


def test_random_options(tmp_path: Path) -> None:
    options = (
        "--hidden 48 --layers 3 --heads 6 --kv-heads 3 --head-dim 10 --ffn 40 --experts 5 --top-k 3 --vocab 300 "
        "--max-context 99 --sliding-window 12 --rope-theta 500 --tie-embeddings --dtype bfloat16 --seed 7 --fused "
        "--shard-mb 1"
    )
    assert run("random", tmp_path / "m", *options.split()).exit_code == 0
    checkpoint = Checkpoint(tmp_path / "m")
    checkpoint.verify()
    assert checkpoint.spec == replace(
        SMALL, hidden_size=48, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=10, ffn_size=40, n_experts=5, top_k=3,
        vocab_size=300, max_context=99, sliding_window=12, rope_theta=500.0, tie_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()


def test_random_of_another_family(tmp_path: Path) -> None:
    assert run("random", tmp_path / "m", "--family", "qwen3_moe", "--layers", "1").exit_code == 0
    assert Checkpoint(tmp_path / "m").spec == of_family(replace(SMALL, n_layers=1), "qwen3_moe")


def test_random_refuses(tmp_path: Path) -> None:
    refused(run("random", tmp_path / "m", "--family", "gpt2"), "unknown family 'gpt2'; supported: mixtral")
    refused(run("random", tmp_path / "m", "--family", "olmoe", "--sliding-window", "7"), "a olmoe cannot say")
    refused(run("random", tmp_path / "m", "--top-k", "9"), "top-9 of 8 experts")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    refused(run("random", tmp_path / "full"), "exists already")
    assert run("random", tmp_path / "m", "--layers", "0").exit_code == 2


def test_upcycle(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense")
    result = run("upcycle", tmp_path / "dense", tmp_path / "moe", "--experts", "4", "--top-k", "1")
    assert result.exit_code == 0
    spec = Checkpoint(tmp_path / "moe").spec
    assert (spec.n_experts, spec.top_k) == (4, 1)
    refused(run("upcycle", tmp_path / "dense", tmp_path / "other", "--top-k", "9"), "top-9 of 8 experts")
    refused(run("upcycle", tmp_path / "nowhere", tmp_path / "other"), "nowhere")


def test_default_prints_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "expertmesh" / "models" / NAME).mkdir(parents=True)
    result = run("default")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/expertmesh/models/{NAME}\n")
