"""What every engine is asked, and who is asked."""

from __future__ import annotations

from typing import Protocol

import torch

from workers.spec import ModelSpec

DECODE_PROMPT = 16  # tokens of each prompt before decoding is timed
DECODE_STEPS = 32  # steps timed
DECODE_BATCHES = (1, 16)
PREFILL_TOKENS = 512

RANDOM_200M = ModelSpec(
    hidden_size=512, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=64, ffn_size=1792, n_experts=8, top_k=2,
    vocab_size=32000, rope_theta=1e6, norm_eps=1e-5, sliding_window=None, tie_embeddings=False, max_context=4096,
    bos_id=1, eos_ids=(2,), dtype=torch.float32,
)  # fmt: skip
"""The model of the figures: about 200 million parameters, of which a token reads 66 million."""


class Runner(Protocol):
    """One engine with one model loaded."""

    name: str

    def decode(self, batch: int) -> float:
        """Tokens per second of `batch` greedy sequences, from the first generated token on."""

    def prefill(self, n_tokens: int) -> float:
        """Prompt tokens per second of one sequence, up to the first generated token."""


def prompts(n: int, length: int, vocab_size: int) -> list[list[int]]:
    """`n` different random prompts of `length` tokens, always the same ones; no special ids."""
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(10, vocab_size, (n, length), generator=generator).tolist()
    return ids
