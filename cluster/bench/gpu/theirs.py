"""transformers on the same weights and card, as fast as it goes: static cache, grouped products, captured by hand."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from cluster.bench.gpu.ours import CONTEXT
from cluster.bench.gpu.timing import event_us, median_us


class Transformers:
    """The forward pass alone: no scheduler, no sampling."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size

    @torch.no_grad()
    def decode(self, batch: int) -> float:
        """Tokens per second of a step of `batch` sequences with CONTEXT tokens, replayed as one CUDA graph."""
        from transformers import StaticCache

        cache: Any = StaticCache(config=self._model.config, max_cache_len=CONTEXT + 8)
        token = torch.randint(self._vocab_size, (batch, 1), device="cuda")
        position = torch.full((1, 1), CONTEXT - 1, device="cuda")
        self._model(token, past_key_values=cache)  # the cache allocates outside of what is captured

        def once() -> None:
            self._model(token, past_key_values=cache, position_ids=position)

        def reset() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(CONTEXT - 1)

        for _ in range(3):
            reset()
            once()
        torch.cuda.synchronize()
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        took = []
        for _ in range(5):
            reset()
            torch.cuda.synchronize()
            took.append(event_us(graph.replay))
        return batch / statistics.median(took) * 1e6

    @torch.no_grad()
    def prefill(self, n_tokens: int) -> float:
        """Milliseconds of a prompt's forward pass."""
        ids = torch.randint(self._vocab_size, (1, n_tokens), device="cuda")
        return median_us(lambda: self._model(ids, use_cache=False, logits_to_keep=1), 3) / 1000
