"""A JSON configuration that complains with the file's name, and knows which of its keys were read."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from workers.errors import CheckpointError

Value = TypeVar("Value", int, float, bool, str)

log = logging.getLogger(__name__)

# Keys that change what some family computes, and the values that change nothing. Whatever a family does not read and
# finds at another value is refused, since it would be computed wrongly rather than exactly.
DECISIVE: dict[str, tuple[Any, ...]] = {
    # weights of another form, models of another shape
    "quantization_config": (), "compression_config": (), "is_encoder_decoder": (False,), "text_config": (),
    "vision_config": (), "audio_config": (), "kv_lora_rank": (), "q_lora_rank": (), "num_kv_shared_layers": (0,),
    # biases
    "attention_bias": (False,), "qkv_bias": (False,), "mlp_bias": (False,), "use_bias": (False,), "bias": (False,),
    "add_bias_linear": (False,), "add_qkv_bias": (False,), "attention_out_bias": (False,), "lm_head_bias": (False,),
    # attention
    "clip_qkv": (), "use_qk_norm": (False,), "qk_layernorm": (False,), "qk_norm": (False,),
    "attn_output_gate": (False,),
    "sliding_window": (0,), "use_sliding_window": (False,), "layer_types": (), "attention_chunk_size": (0,),
    "attn_logit_softcapping": (0,), "attention_multiplier": (1.0,), "query_pre_attn_scalar": (), "alibi": (False,),
    "use_alibi": (False,), "parallel_attn": (False,), "use_parallel_residual": (False,), "attention_sink": (False,),
    # rotary embedding
    "partial_rotary_factor": (1.0,), "rotary_pct": (1.0,), "rotary_dim": (), "rope_interleave": (False,),
    "rope_interleaved": (False,), "no_rope_layers": ([],), "no_rope_layer_interval": (0,), "rope_local_base_freq": (),
    "original_max_position_embeddings": (), "position_embedding_type": ("rope", "absolute"),
    # norms and multipliers
    "norm_type": ("rmsnorm", "rms_norm"), "use_post_norm": (False,), "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,), "logits_scaling": (1.0,), "logit_scale": (1.0,), "scale_emb": (1,),
    "scale_depth": (), "dim_model_base": (), "final_logit_softcapping": (0,), "hidden_activation": ("silu", "swish"),
    # experts
    "num_experts": (0,), "num_local_experts": (0, 1), "n_routed_experts": (0,), "norm_topk_prob": (),
    "scoring_func": ("softmax",), "topk_method": ("greedy",), "routed_scaling_factor": (1.0,), "n_group": (0, 1),
    "topk_group": (0, 1), "use_routing_bias": (False,), "moe_router_use_bias": (False,), "n_shared_experts": (0,),
    "num_shared_experts": (0,), "shared_intermediate_size": (0,), "shared_expert_intermediate_size": (0,),
    "first_k_dense_replace": (0,), "moe_layer_freq": (1,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
    "interleave_moe_layer_step": (1,), "swiglu_limit": (0,),
}  # fmt: skip

# Keys that change nothing: how the model was trained, is stored or is used by other programs.
_HARMLESS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "_attn_implementation", "architectures", "attention_dropout",
    "attn_implementation", "auto_map", "chunk_size_feed_forward", "embd_pdrop", "hidden_dropout",
    "id2label", "initializer_range", "label2id", "max_window_layers", "model_name", "model_type",
    "num_mtp_layers", "num_nextn_predict_layers", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "sep_token_id", "task_specific_params", "tokenizer_class", "transformers_version",
    "unk_token_id", "use_cache", "use_mtp", "vocab_file", "z_loss_coef",
})  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory has a {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different, for `json.loads`. Raises ValueError naming one that is not: which
    of its values is meant nobody can know."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


@dataclass(frozen=True, slots=True)
class Config:
    """The values of a JSON object in a file; `prefix` names the object within it. null is the same as absent."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""
    read: set[str] = field(default_factory=set)

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """The value of `key`, a finite number where it is one. Raises CheckpointError."""
        value = self.find(key, kind)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: `{self.prefix}{key}` is missing")
        return value

    def find(self, key: str, kind: type[Value]) -> Value | None:
        """The value of `key`, or None where there is none. Raises CheckpointError when it is of another type."""
        self.read.add(key)
        value = self.values.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise CheckpointError(f"{self.path}: `{self.prefix}{key}` is {value!r}, not {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{self.path}: `{self.prefix}{key}` is {value}, not a finite number")
        return value

    def has(self, key: str) -> bool:
        """Whether `key` is there, null included: some families mean something else by silence."""
        return key in self.values

    def object(self, key: str) -> Config:
        """The object at `key`, empty where there is none."""
        self.read.add(key)
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{self.path}: `{self.prefix}{key}` is {value!r}, not an object")
        return Config(self.path, value or {}, f"{self.prefix}{key}.")

    def integers(self, key: str) -> tuple[int, ...]:
        """The integers at `key`, none where it is absent."""
        self.read.add(key)
        value = self.values.get(key)
        if not isinstance(value, list | None) or not all(type(item) is int for item in value or ()):
            raise CheckpointError(f"{self.path}: `{self.prefix}{key}` is {value!r}, not a list of integers")
        return tuple(value or ())

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, several or none."""
        self.read.add(key)
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(f"{self.path}: `{key}` is {value!r}, not one or several token ids")
        return tuple(ids)

    def allow(self, key: str, *allowed: Any) -> None:
        """Raise CheckpointError unless `key` is absent or one of `allowed`."""
        self.read.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            supported = ", ".join(repr(item) for item in allowed) or "none"
            raise CheckpointError(f"{self.path}: unsupported `{self.prefix}{key}` {value!r}; supported: {supported}")

    def skip(self, *keys: str) -> None:
        """These change nothing in this family."""
        self.read.update(keys)

    def refuse_unread(self, known: Collection[str] = ()) -> None:
        """Raise CheckpointError for a key that nobody read and that changes the result; log one that is unknown."""
        unread = [key for key, value in self.values.items() if key not in self.read and value is not None]
        for key in unread:
            if key in DECISIVE:
                self.allow(key, *DECISIVE[key])
            elif key not in _HARMLESS and key not in known:
                log.warning("%s: `%s` is not known here and has no effect", self.path, key)
