"""Registry: what a `config.json` says is what is computed, in every family, and what cannot be is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from workers.errors import CheckpointError
from workers.families.registry import read_spec
from workers.spec import ModelSpec

SIZES: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def read(directory: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    values = {key: value for key, value in (SIZES | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_spec(directory)


def test_sizes(tmp_path: Path) -> None:
    spec = read(tmp_path, rope_theta=5e5, sliding_window=100, tie_word_embeddings=True, dtype="bfloat16")
    assert spec == ModelSpec(
        hidden_size=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_size=96, n_experts=8, top_k=2,
        vocab_size=100, rope_theta=5e5, norm_eps=1e-6, sliding_window=100, tie_embeddings=True, max_context=512,
        bos_id=1, eos_ids=(2,), dtype=torch.bfloat16,
    )  # fmt: skip


def test_what_transformers_writes_today(tmp_path: Path) -> None:
    """Newer transformers nest the rotary base and write null for a derived head size."""
    rope = {"rope_type": "default", "rope_theta": 321.0}
    MixtralConfig(hidden_size=64, num_attention_heads=8, rope_parameters=rope, dtype="float16").save_pretrained(
        tmp_path
    )
    spec = read_spec(tmp_path)
    assert (spec.rope_theta, spec.head_dim, spec.sliding_window, spec.dtype) == (321.0, 8, None, torch.float16)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({}, "rope_theta", 1e6),
        ({"rope_theta": 10000}, "rope_theta", 10000.0),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7, "rope_type": "default"}}, "rope_theta", 7.0),
        ({"rope_scaling": None}, "rope_theta", 1e6),
        ({"head_dim": 24}, "head_dim", 24),
        ({"num_key_value_heads": ...}, "n_kv_heads", 4),
        ({"torch_dtype": "bfloat16"}, "dtype", torch.bfloat16),
        ({"eos_token_id": [5, 6]}, "eos_ids", (5, 6)),
        ({"eos_token_id": None}, "eos_ids", ()),
        ({"eos_token_id": 0}, "eos_ids", (0,)),
        ({"bos_token_id": None}, "bos_id", None),
        ({"bos_token_id": 0}, "bos_id", 0),
    ],
)
def test_variants(tmp_path: Path, changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(read(tmp_path, **changes), field) == value


@pytest.mark.parametrize(("eos", "expected"), [([7, 8], (7, 8)), (9, (9,)), (None, (2,))])
def test_the_generation_config_says_when_to_stop(tmp_path: Path, eos: object, expected: tuple[int, ...]) -> None:
    assert read(tmp_path, generation={"eos_token_id": eos}).eos_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "unsupported architecture 'qwen3'; supported: mixtral"),
        ({"model_type": ...}, "unsupported architecture None"),
        ({"hidden_act": "gelu"}, "unsupported `hidden_act` 'gelu'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rotary scaling 'su'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rotary scaling 'longrope'"),
        ({"rope_parameters": 3}, "`rope_parameters` is 3"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": ...}, "`hidden_size` is missing"),
        ({"hidden_size": "64"}, "`hidden_size` is '64', not int"),
        ({"hidden_size": True}, "`hidden_size` is True, not int"),
        ({"num_hidden_layers": 0}, "n_layers is 0, not positive"),
        ({"vocab_size": -5}, "vocab_size is -5, not positive"),
        ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_experts_per_tok": 9}, "top-9 of 8 experts"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"eos_token_id": "2"}, "`eos_token_id` is '2'"),
        ({"dtype": "float8_e4m3fn"}, "unsupported dtype"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read(tmp_path, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\xff"])
def test_a_broken_config_file_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(tmp_path)
