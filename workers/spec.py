"""What a model is made of, in words that fit every family: its sizes, its attention, its gate, who has experts.

`workers.families` reads it from a checkpoint's `config.json`, each family in its own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from workers.gate_spec import GateSpec


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the frequencies of the rotary embedding are stretched for contexts longer than those of the training.

    linear: position interpolation (Chen et al. 2023, arXiv 2306.15595). dynamic: the base grows with the length (NTK).
    yarn: NTK by parts (Peng et al. 2023, arXiv 2309.00071, section 3.2). llama3: by wavelength, as Llama 3.1 does.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_context: int = 0  # tokens that the frequencies were trained on; not of linear
    attention_factor: float = 1.0  # yarn: what cos and sin are multiplied by
    beta_fast: float = 32.0  # yarn: frequencies that turn more often than this in `original_context` stay as they are
    beta_slow: float = 1.0  # yarn: those that turn less often are divided by `factor`
    truncate: bool = True  # yarn: whether these borders are whole dimensions
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_context / this are stretched by `factor`
    high_freq_factor: float = 4.0  # llama3: those below original_context / this are not


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and options of one model; the defaults are those of a Mixtral."""

    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int  # of an expert
    n_experts: int  # of a layer that has any; 0: a dense model
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
    family: str = "mixtral"  # `model_type`

    # Attention
    rotary_dim: int | None = None  # the first numbers of each head that are rotated; None: all
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: Literal["head", "row"] | None = None  # RMSNorm of queries and keys: each head alone, or all heads together
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    full_layers: frozenset[int] = frozenset()  # the layers that `sliding_window` does not concern

    # Experts
    gate_score: Literal["softmax", "sigmoid"] = "softmax"  # of all experts' logits
    gate_normalize: bool = True  # whether the chosen experts' weights are made to sum to one
    gate_scale: float = 1.0  # of the weights, at last
    gate_bias: bool = False  # whether a bias is added to the scores to choose by
    dense_layers: frozenset[int] = frozenset()  # layers with one FFN instead of experts
    dense_ffn_size: int = 0  # of such a layer
    shared_ffn_size: int = 0  # of the FFN that every token takes beside its experts; 0: there is none
    shared_gate: bool = False  # whether that is weighted by a sigmoid of its own

    # Multipliers, as Granite has them
    embed_scale: float = 1.0  # of the embedding
    residual_scale: float = 1.0  # of what attention and FFN add to the residual stream
    logits_scaling: float = 1.0  # what the logits are divided by

    @property
    def gate(self) -> GateSpec:
        """How a token's experts are chosen and weighted."""
        return GateSpec(self.top_k, self.gate_score, self.gate_normalize, self.gate_scale)

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rotary_size(self) -> int:
        """How many numbers of a head are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        return tuple(layer for layer in range(self.n_layers) if layer not in self.dense_layers)

    @property
    def experts(self) -> tuple[tuple[int, int], ...]:
        """Every (layer, expert) of the model, ascending."""
        return tuple((layer, expert) for layer in self.sparse_layers for expert in range(self.n_experts))

    def window(self, layer: int) -> int | None:
        """How many tokens a token of `layer` attends to, itself included; None: to all before it."""
        return None if layer in self.full_layers else self.sliding_window
