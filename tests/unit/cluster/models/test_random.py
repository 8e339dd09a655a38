"""Random checkpoints: one seed is one model in every layout, every expert is another one, a client can talk to it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import CheckpointError
from cluster.models.random import SMALL, of_family, write_random
from cluster.models.tokenizer import MIN_VOCABULARY
from workers.checkpoint import Checkpoint
from workers.families.registry import FAMILIES
from workers.weights import FORMATS

TINY = replace(SMALL, hidden_size=16, head_dim=4, ffn_size=24, n_experts=3)


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(20)[None] * 7 % 97).logits


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"shard_bytes": 5000}, {"fused": True, "shard_bytes": 5000}], ids=str
)
def test_layout_and_sharding_do_not_change_the_model(tmp_path: Path, options: dict[str, Any]) -> None:
    write_random(tmp_path / "plain", TINY, seed=5)
    write_random(tmp_path / "other", TINY, seed=5, **options)
    Checkpoint(tmp_path / "other").verify()
    assert torch.equal(logits(tmp_path / "plain"), logits(tmp_path / "other"))
    files = sorted((tmp_path / "other").glob("*.safetensors"))
    assert (len(files) > 1) == ("shard_bytes" in options)
    if "shard_bytes" in options:  # an embedding alone is larger than a shard
        index = json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())["weight_map"]
        several = [file for file in files if list(index.values()).count(file.name) > 1]
        assert several and all(file.stat().st_size < 5000 + 2000 for file in several)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tie_embeddings": True},
        {"head_dim": 10, "n_kv_heads": 1},
        {"sliding_window": 5, "rope_theta": 50.0},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "vocab_size": 100, "top_k": 3},
    ],
    ids=str,
)
def test_the_spec_survives_the_disk(tmp_path: Path, sizes: dict[str, Any]) -> None:
    spec = replace(TINY, **sizes)
    write_random(tmp_path, spec)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.verify()
    assert checkpoint.spec == spec
    assert 0.3 < float(logits(tmp_path).std()) < 5  # neither flat nor saturated: differences show


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_any_family_is_what_transformers_reads(tmp_path: Path, family: str, fused: bool) -> None:
    """No tensor too few, none too many, every option said in the family's own words."""
    spec = of_family(TINY, family)
    write_random(tmp_path / "model", spec, fused=fused, seed=3)
    checkpoint = Checkpoint(tmp_path / "model")
    checkpoint.verify()
    assert checkpoint.spec == spec
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == FAMILIES[family].architecture
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    write_random(tmp_path / "other", spec, fused=not fused, seed=3)
    assert torch.equal(logits(tmp_path / "model"), logits(tmp_path / "other"))


def test_an_option_that_a_family_has_no_word_for(tmp_path: Path) -> None:
    """Written without it, the file would be another model than the one asked for."""
    with pytest.raises(CheckpointError, match="a mixtral cannot say this qk_norm"):
        write_random(tmp_path, replace(TINY, qk_norm="head"))


def test_every_expert_is_another_one(tmp_path: Path) -> None:
    """Equal experts would hide a token that went to the wrong one."""
    write_random(tmp_path, TINY)
    checkpoint = Checkpoint(tmp_path)
    experts = [checkpoint.expert(layer, expert, FORMATS["float32"]) for layer in range(2) for expert in range(3)]
    matrices = [getattr(expert, field.name).flatten() for expert in experts for field in fields(expert)]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == 18


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    write_random(tmp_path / "0", TINY, seed=0)
    write_random(tmp_path / "1", TINY, seed=1)
    assert not torch.allclose(logits(tmp_path / "0"), logits(tmp_path / "1"), atol=0.1)


@pytest.mark.parametrize("vocabulary", [MIN_VOCABULARY, 512, 4000])
def test_any_text_survives_the_tokenizer(tmp_path: Path, vocabulary: int) -> None:
    write_random(tmp_path, replace(TINY, vocab_size=vocabulary))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, 世界! 🙂 \x00\t\n  def f(x):\r\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < vocabulary and len(tokenizer) <= vocabulary
    chat = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(TINY.eos_ids[0]) == 1 and tokenizer.eos_token_id == TINY.eos_ids[0]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_random(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="top-4 of 3"):
        write_random(tmp_path / "new", replace(TINY, top_k=4))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_random(tmp_path / "file" / "new", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
