"""The rotary embedding: every scaling, in both forms of `config.json`, gives transformers' own angles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cluster.models.random import SMALL, of_family
from workers.families.registry import config_of, read_spec
from workers.model.rope import Rope

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 8,
     "beta_slow": 2},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


@pytest.mark.parametrize("form", ["new", "old", "oldest"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_same_angles_as_transformers(scaling: dict[str, Any], form: str, tmp_path: Path) -> None:
    """Newer files have one object, older ones two keys, and the oldest say `type`."""
    values = config_of(of_family(SMALL, "llama")) | {"rope_theta": 5e3, "max_position_embeddings": 256, "head_dim": 32}
    del values["rope_parameters"]
    if form == "new":
        del values["rope_theta"]
        values["rope_parameters"] = scaling | {"rope_theta": 5e3}
    else:
        names = {"rope_type": "type"} if form == "oldest" else {}
        values["rope_scaling"] = {names.get(key, key): value for key, value in scaling.items()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.tensor([0, 1, 63, 64, 255])
    expected = [part[0] for part in theirs(torch.zeros(1), positions[None])]
    for ours_Tr, theirs_Tr in zip(
        Rope(read_spec(tmp_path), torch.device("cpu")).angles(positions), expected, strict=True
    ):
        torch.testing.assert_close(ours_Tr, theirs_Tr, atol=1e-5, rtol=0)


def test_dynamic_scaling_stretches_each_token_by_its_own_context(tmp_path: Path) -> None:
    """A token rotated by the length of the whole prompt would depend on how the prompt was cut."""
    values = config_of(of_family(SMALL, "llama")) | {"max_position_embeddings": 64}
    values["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = read_spec(tmp_path)
    assert spec.max_context == 256
    rope, theirs = Rope(spec, torch.device("cpu")), LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.tensor([10, 63, 64, 100, 255])
    cos_Tr, sin_Tr = rope.angles(positions)
    for row, position in enumerate(positions.tolist()):
        expected = theirs(torch.zeros(1), torch.tensor([[position]]))
        torch.testing.assert_close(cos_Tr[row], expected[0][0, 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(sin_Tr[row], expected[1][0, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_parameters": SCALINGS[-1] | {"rope_theta": 1.0}}, 512),
    ],
)
def test_how_long_a_context_may_be(values: dict[str, Any], context: int, tmp_path: Path) -> None:
    """Where the file states what the model was trained on, scaling allows more; else it counts the scaling already."""
    config = config_of(of_family(SMALL, "llama")) | {"max_position_embeddings": 512, "rope_parameters": None} | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path).max_context == context
