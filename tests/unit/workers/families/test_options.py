"""What a family does not do is refused by name: a key that was ignored would give other answers without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.models.random import SMALL, of_family
from workers.errors import CheckpointError
from workers.families.config import DECISIVE
from workers.families.registry import FAMILIES, config_of, read_spec, spec_of

ROPE = {"rope_theta": 1e4}

# What others do not do and these families do.
DONE = {"glm4_moe": {"attention_bias", "partial_rotary_factor", "n_shared_experts", "routed_scaling_factor",
                     "scoring_func", "first_k_dense_replace", "use_qk_norm"}}  # fmt: skip

# Of every family: an option that changes what it computes, at a value that it does not have here.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *[
        (family, changes, says)
        for family in FAMILIES
        for changes, says in (
            ({"attention_bias": True}, "unsupported `attention_bias` True"),
            ({"hidden_act": "gelu"}, "unsupported `hidden_act` 'gelu'"),
            ({"quantization_config": {"bits": 4}}, "`quantization_config`"),
            ({"partial_rotary_factor": 0.5}, "unsupported `partial_rotary_factor` 0.5"),
            (
                {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
                "rotary scaling 'longrope'",
            ),
            ({"rope_scaling": {"type": "su"}}, "rotary scaling 'su' in `rope_scaling`"),
            ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rotary scaling 'mrope'"),
            ({"rope_parameters": ROPE | {"rope_type": "ntk"}}, "rotary scaling 'ntk' in `rope_parameters`"),
            ({"rope_parameters": {"full_attention": ROPE}}, "unsupported `rope_parameters.full_attention`"),
            ({"rope_scaling": {"type": "linear"}}, "`rope_scaling.factor` is missing"),
            ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "`rope_scaling.factor` is 0.5"),
            ({"rope_scaling": {"type": "linear", "factor": "2"}}, "`rope_scaling.factor` is '2', not float"),
            (
                {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 9}},
                "`rope_scaling.beta_fast`",
            ),
            ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 9}}, "unsupported `rope_scaling.alpha` 9"),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "`rope_scaling.low_freq_factor` is missing"),
            ({"rope_theta": float("inf"), "rope_parameters": None}, "`rope_theta` is inf, not a finite number"),
            ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` is nan, not a finite number"),
            ({"final_logit_softcapping": 30.0}, "unsupported `final_logit_softcapping` 30.0"),
            ({"attn_logit_softcapping": 50.0}, "unsupported `attn_logit_softcapping` 50.0"),
            ({"n_shared_experts": 1}, "unsupported `n_shared_experts` 1"),
            ({"routed_scaling_factor": 2.5}, "unsupported `routed_scaling_factor` 2.5"),
            ({"scoring_func": "sigmoid"}, "unsupported `scoring_func` 'sigmoid'"),
            ({"first_k_dense_replace": 1}, "unsupported `first_k_dense_replace` 1"),
            ({"use_qk_norm": True}, "unsupported `use_qk_norm` True"),
            ({"kv_lora_rank": 512}, "unsupported `kv_lora_rank` 512"),
        )
        if not changes.keys() & DONE.get(family, set())
    ],
    ("glm4_moe", {"n_group": 4}, "unsupported `n_group` 4"),
    ("glm4_moe", {"topk_group": 2}, "unsupported `topk_group` 2"),
    ("glm4_moe", {"scoring_func": "softmax"}, "unsupported `scoring_func` 'softmax'; supported: 'sigmoid'"),
    ("glm4_moe", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.1}}, "unsupported `partial_rotary_factor` 0.1"),
    ("llama", {"mlp_bias": True}, "unsupported `mlp_bias` True"),
    ("llama", {"num_local_experts": 8}, "unsupported `num_local_experts` 8"),
    ("mistral", {"layer_types": ["sliding_attention"] * 2}, "unsupported `layer_types`"),
    ("mixtral", {"qkv_bias": True}, "unsupported `qkv_bias` True"),
    ("mixtral", {"shared_expert_intermediate_size": 96}, "unsupported `shared_expert_intermediate_size` 96"),
    ("mixtral", {"norm_topk_prob": False}, "unsupported `norm_topk_prob` False"),
    ("mixtral", {"residual_multiplier": 0.5}, "unsupported `residual_multiplier` 0.5"),
    ("granitemoe", {"sliding_window": 7}, "unsupported `sliding_window` 7"),
    ("granitemoe", {"shared_intermediate_size": 96}, "unsupported `shared_intermediate_size` 96"),
    ("granitemoe", {"logits_scaling": 0.0}, "logits_scaling is 0.0, not positive"),
    ("olmoe", {"clip_qkv": 8.0}, "unsupported `clip_qkv` 8.0"),
    ("olmoe", {"sliding_window": 7}, "unsupported `sliding_window` 7"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "`use_sliding_window` is not true"),
    ("qwen2_moe", {"layer_types": ["full_attention"]}, "`layer_types` is ['full_attention'], not 2 of"),
    ("qwen2_moe", {"layer_types": ["chunked_attention"] * 2}, "`layer_types` is"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "`decoder_sparse_step` is 0"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "`mlp_only_layers` is 1, not a list of integers"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 96}, "unsupported `shared_expert_intermediate_size` 96"),
    ("qwen3_moe", {"num_local_experts": 4}, "unsupported `num_local_experts` 4"),
]


@pytest.mark.parametrize(("family", "changes", "says"), REFUSED, ids=[f"{case[0]}-{case[1]}" for case in REFUSED])
def test_refused_by_name(family: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    values = config_of(of_family(SMALL, family)) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        read_spec(tmp_path)
    assert says in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_and_what_changes_nothing_are_taken(family: str) -> None:
    """Files on the hub are full of options that are off; refusing them would refuse every model."""
    spec = of_family(SMALL, family)
    values = config_of(spec)
    unread = [key for key in DECISIVE if key not in values.keys() | DONE.get(family, set())]
    off = {key: (*DECISIVE[key], None)[0] for key in unread}
    assert spec_of(off | values | {"rope_scaling": None}, Path("config.json")) == spec
    assert spec_of(dict.fromkeys(off) | values | {"transformers_version": "4.40"}, Path("config.json")) == spec


def test_a_key_that_nobody_knows_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert spec_of(config_of(SMALL) | {"frobnication": 3, "use_cache": True}, Path("config.json")) == SMALL
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: `frobnication` is not known here and has no effect"
    ]
