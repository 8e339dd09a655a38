"""Random experts that every process of a test can make alike, and what they compute in float64.

Legend: T token rows, K experts a token, D hidden size, F ffn size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.checkpoint import ExpertWeights
from workers.shard import ExpertShard
from workers.spec import ModelSpec


@dataclass(frozen=True)
class Model:
    """Sizes of a test's experts; the weights follow from them."""

    n_layers: int = 2
    n_experts: int = 6
    hidden_size: int = 32
    ffn_size: int = 48
    dtype: torch.dtype = torch.float32

    def spec(self) -> ModelSpec:
        return ModelSpec(
            hidden_size=self.hidden_size, n_layers=self.n_layers, n_heads=1, n_kv_heads=1, head_dim=self.hidden_size,
            ffn_size=self.ffn_size, n_experts=self.n_experts, top_k=2, vocab_size=8, rope_theta=1e4, norm_eps=1e-5,
            sliding_window=None, tie_embeddings=False, max_context=64, bos_id=None, eos_ids=(), dtype=self.dtype,
        )  # fmt: skip

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        draw = torch.Generator().manual_seed(1000 * layer + expert)
        d, f = self.hidden_size, self.ffn_size
        shapes = ((f, d), (f, d), (d, f))  # w1, w3, w2
        w1_FD, w3_FD, w2_DF = (torch.randn(n, m, generator=draw).mul_(m**-0.5).to(self.dtype) for n, m in shapes)
        return ExpertWeights(w1_FD=w1_FD, w2_DF=w2_DF, w3_FD=w3_FD)

    def shard(self, experts: Iterable[tuple[int, int]]) -> ExpertShard:
        shard = ExpertShard(self.spec())
        for layer, expert in experts:
            shard.load(layer, expert, self.weights(layer, expert))
        return shard

    def reference(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the experts, in float64."""
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
        for expert in range(self.n_experts):
            tokens, choice = (ids_TK == expert).nonzero(as_tuple=True)
            weights = self.weights(layer, expert)
            x = x_TD[tokens].double()
            hidden = F.silu(x @ weights.w1_FD.double().T) * (x @ weights.w3_FD.double().T)
            y_TD[tokens] += weights_TK[tokens, choice, None].double() * (hidden @ weights.w2_DF.double().T)
        return y_TD


@dataclass(frozen=True)
class Batch:
    """What a router dispatches."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def batch(model: Model, n_tokens: int, k: int = 2, seed: int = 0, experts: Iterable[int] | None = None) -> Batch:
    """Random rows; each token chooses `k` different ones of `experts`, in no order."""
    draw = torch.Generator().manual_seed(seed)
    pool = torch.tensor(list(range(model.n_experts) if experts is None else experts))
    choices = torch.rand(n_tokens, len(pool), generator=draw).argsort(dim=1)[:, :k]
    return Batch(
        torch.randn(n_tokens, model.hidden_size, generator=draw).to(model.dtype),
        pool[choices],
        torch.softmax(torch.randn(n_tokens, k, generator=draw), dim=-1),
    )
