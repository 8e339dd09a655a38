"""What a model family is made of: its sizes, and the names and shapes of its tensors on disk.

Shape legend: V vocabulary, D hidden size, H query heads, G key/value heads, A head size, E experts, F expert FFN size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from workers.errors import CheckpointError

Shape = tuple[int, ...]
Value = TypeVar("Value", int, float, bool)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a Mixtral-family model, as its `config.json` states them."""

    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    n_experts: int
    top_k: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    sliding_window: int | None  # a token attends to itself and the `sliding_window - 1` before it; None: to all
    tie_embeddings: bool
    max_context: int  # tokens, prompt and answer together
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: torch.dtype  # as stored on disk

    @classmethod
    def from_config(cls, directory: str | Path) -> ModelSpec:
        """Read `config.json` (and `generation_config.json`, where it exists) of a checkpoint directory.

        Raises CheckpointError when a file is missing or broken, a size is missing or cannot be right, or the
        architecture is not one this code computes exactly.
        """
        directory = Path(directory)
        spec = cls.from_values(read_json(directory / "config.json"), directory / "config.json")
        path = directory / "generation_config.json"
        eos_ids = _Config(path, read_json(path)).token_ids("eos_token_id") if path.is_file() else ()
        return replace(spec, eos_ids=eos_ids) if eos_ids else spec

    @classmethod
    def from_values(cls, values: Mapping[str, Any], origin: Path) -> ModelSpec:
        """The spec that the values of a `config.json` state; errors name `origin`. Raises CheckpointError."""
        config = _Config(origin, values)
        config.check_architecture()
        n_heads = config.get("num_attention_heads", int)
        hidden_size = config.get("hidden_size", int)
        spec = cls(
            hidden_size=hidden_size,
            n_layers=config.get("num_hidden_layers", int),
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads", int, n_heads),
            head_dim=config.get("head_dim", int, hidden_size // max(n_heads, 1)),
            ffn_size=config.get("intermediate_size", int),
            n_experts=config.get("num_local_experts", int),
            top_k=config.get("num_experts_per_tok", int),
            vocab_size=config.get("vocab_size", int),
            rope_theta=config.rope_theta(),
            norm_eps=config.get("rms_norm_eps", float, 1e-5),
            sliding_window=config.values.get("sliding_window") and config.get("sliding_window", int),
            tie_embeddings=config.get("tie_word_embeddings", bool, False),
            max_context=config.get("max_position_embeddings", int),
            bos_id=config.token_id("bos_token_id"),
            eos_ids=config.token_ids("eos_token_id"),
            dtype=config.dtype(),
        )
        config.check_sizes(spec)
        return spec

    @property
    def tensor_names(self) -> TensorNames:
        """The names and shapes of the tensors of a model of these sizes."""
        return TensorNames(self)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names and shapes of a Mixtral's tensors on disk.

    Two layouts exist. *Per expert*: `model.layers.L.block_sparse_moe.experts.E.{w1,w2,w3}.weight`, one tensor each.
    *Fused*: `model.layers.L.mlp.experts.gate_up_proj` [E, 2F, D] (rows of w1, then rows of w3) and `down_proj`
    [E, D, F]. The gate goes with the block: `block_sparse_moe.gate.weight` or `mlp.gate.weight`.
    """

    spec: ModelSpec

    def embed(self) -> tuple[str, Shape]:
        return "model.embed_tokens.weight", (self.spec.vocab_size, self.spec.hidden_size)

    def norm(self) -> tuple[str, Shape]:
        return "model.norm.weight", (self.spec.hidden_size,)

    def head(self) -> tuple[str, Shape]:
        """The output head. Not on disk (or ignored there) when it is tied to the embedding."""
        return "lm_head.weight", (self.spec.vocab_size, self.spec.hidden_size)

    def layer(self, layer: int, *, fused: bool) -> dict[str, tuple[str, Shape]]:
        """The dense tensors of one layer, keyed by their field in `DenseLayer`."""
        spec, prefix = self.spec, f"model.layers.{layer}."
        hidden, q, kv = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        block = "mlp" if fused else "block_sparse_moe"
        return {
            "input_norm_D": (prefix + "input_layernorm.weight", (hidden,)),
            "q": (prefix + "self_attn.q_proj.weight", (q, hidden)),
            "k": (prefix + "self_attn.k_proj.weight", (kv, hidden)),
            "v": (prefix + "self_attn.v_proj.weight", (kv, hidden)),
            "o": (prefix + "self_attn.o_proj.weight", (hidden, q)),
            "post_norm_D": (prefix + "post_attention_layernorm.weight", (hidden,)),
            "gate_ED": (prefix + f"{block}.gate.weight", (spec.n_experts, hidden)),
        }

    def expert(self, layer: int, expert: int) -> dict[str, tuple[str, Shape]]:
        """The tensors of one expert in the per-expert layout, keyed by their field in `ExpertWeights`."""
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        hidden, ffn = self.spec.hidden_size, self.spec.ffn_size
        return {
            "w1_FD": (prefix + "w1.weight", (ffn, hidden)),
            "w2_DF": (prefix + "w2.weight", (hidden, ffn)),
            "w3_FD": (prefix + "w3.weight", (ffn, hidden)),
        }

    def fused_experts(self, layer: int) -> dict[str, tuple[str, Shape]]:
        """The tensors of all experts of one layer in the fused layout: `gate_up` and `down`."""
        prefix = f"model.layers.{layer}.mlp.experts."
        hidden, ffn, experts = self.spec.hidden_size, self.spec.ffn_size, self.spec.n_experts
        return {
            "gate_up": (prefix + "gate_up_proj", (experts, 2 * ffn, hidden)),
            "down": (prefix + "down_proj", (experts, hidden, ffn)),
        }

    def every(self, *, fused: bool) -> Iterator[tuple[str, Shape]]:
        """Every tensor a checkpoint must hold, in the order of the computation."""
        yield self.embed()
        for layer in range(self.spec.n_layers):
            yield from self.layer(layer, fused=fused).values()
            if fused:
                yield from self.fused_experts(layer).values()
            else:
                for expert in range(self.spec.n_experts):
                    yield from self.expert(layer, expert).values()
        yield self.norm()
        if not self.spec.tie_embeddings:
            yield self.head()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory has a {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


@dataclass(frozen=True, slots=True)
class _Config:
    """A JSON configuration that complains with the file's name."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: `{key}` is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: `{key}` is {value!r}, not {kind.__name__}")
        return value

    def check_architecture(self) -> None:
        """Refuse whatever would be computed wrongly rather than exactly."""
        kind = self.values.get("model_type")
        if kind != "mixtral":
            hint = "; `expertmesh model upcycle` makes a Mixtral of it" if kind in ("llama", "mistral") else ""
            raise CheckpointError(f"{self.path}: unsupported architecture {kind!r}; supported: 'mixtral'{hint}")
        if self.values.get("quantization_config"):
            raise CheckpointError(f"{self.path}: quantized checkpoints (`quantization_config`) are not supported")
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise CheckpointError(f"{self.path}: unsupported `hidden_act` {activation!r}; supported: 'silu'")
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.values.get(key) or {}
            if not isinstance(rope, dict):
                raise CheckpointError(f"{self.path}: `{key}` is {rope!r}, not an object")
            scaling = rope.get("rope_type", rope.get("type", "default"))
            if scaling != "default":
                raise CheckpointError(f"{self.path}: unsupported rotary scaling {scaling!r} in `{key}`")

    def rope_theta(self) -> float:
        """From `rope_parameters` (newer files) or the top level; Mixtral's own base when neither says."""
        nested = _Config(self.path, self.values.get("rope_parameters") or {})
        return nested.get("rope_theta", float, self.get("rope_theta", float, 1e6))

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, several or none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(f"{self.path}: `{key}` is {value!r}, not one or several token ids")
        return tuple(ids)

    def token_id(self, key: str) -> int | None:
        return next(iter(self.token_ids(key)), None)

    def dtype(self) -> torch.dtype:
        name = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        if name not in _DTYPES:
            raise CheckpointError(f"{self.path}: unsupported dtype {name!r}; supported: {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def check_sizes(self, spec: ModelSpec) -> None:
        """Sizes that contradict themselves fail here, not as a shape error in the middle of a step."""
        for name in ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_size", "n_experts", "top_k",
                     "vocab_size", "max_context", "rope_theta", "norm_eps"):  # fmt: skip
            if not getattr(spec, name) > 0:
                raise CheckpointError(f"{self.path}: {name} is {getattr(spec, name)}, not positive")
        if spec.sliding_window is not None and spec.sliding_window < 1:
            raise CheckpointError(f"{self.path}: sliding_window is {spec.sliding_window}, not positive")
        if spec.n_heads % spec.n_kv_heads:
            raise CheckpointError(
                f"{self.path}: {spec.n_heads} attention heads cannot share {spec.n_kv_heads} key/value heads evenly"
            )
        if spec.head_dim % 2:
            raise CheckpointError(f"{self.path}: head_dim {spec.head_dim} is odd; rotary embedding needs pairs")
        if spec.top_k > spec.n_experts:
            raise CheckpointError(f"{self.path}: top-{spec.top_k} of {spec.n_experts} experts is impossible")
