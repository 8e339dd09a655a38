"""Experts that cost nothing, so that a benchmark of the exchange measures nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.shard import ExpertShard
from workers.spec import ModelSpec


class FreeShard(ExpertShard):
    """Experts of one layer that give back what they get. Legend: T token rows, P pairs, D hidden size."""

    def __init__(self, hidden_size: int, n_experts: int = 1) -> None:
        super().__init__(
            ModelSpec(
                hidden_size=hidden_size, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=hidden_size, ffn_size=1,
                n_experts=n_experts, top_k=1, vocab_size=1, rope_theta=1.0, norm_eps=1.0, sliding_window=None,
                tie_embeddings=False, max_context=1, bos_id=None, eos_ids=(), dtype=torch.float32,
            )
        )  # fmt: skip

    def forward(self, layer: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """With one expert a token and one expert a worker, the pairs are the rows, in order."""
        return x_TD
