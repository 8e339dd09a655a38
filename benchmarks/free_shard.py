"""Experts that cost next to nothing, so that a benchmark of the exchange measures nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.checkpoint import ExpertWeights
from workers.shard import ExpertShard
from workers.spec import ModelSpec


class FreeShard(ExpertShard):
    """Experts of one layer with a single hidden unit; many rows come back as they are.

    Legend: T token rows, P pairs, D hidden size.
    """

    def __init__(self, hidden_size: int, n_experts: int = 1) -> None:
        super().__init__(
            ModelSpec(
                hidden_size=hidden_size, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=hidden_size, ffn_size=1,
                n_experts=n_experts, top_k=1, vocab_size=1, rope_theta=1.0, norm_eps=1.0, sliding_window=None,
                tie_embeddings=False, max_context=1, bos_id=None, eos_ids=(), dtype=torch.float32,
            )
        )  # fmt: skip
        for expert in range(n_experts):
            unit_1D = torch.zeros(1, hidden_size)
            self.load(0, expert, ExpertWeights(unit_1D, unit_1D.t(), unit_1D))

    def forward(
        self, layer: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor:
        """With one expert a token and one expert a worker, the pairs are the rows, in order."""
        return x_TD if out_PD is None else out_PD.copy_(x_TD)
