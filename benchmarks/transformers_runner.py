"""transformers on the same checkpoint, as fast as its own options make it."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import DECODE_PROMPT, DECODE_STEPS, prompts
from cluster.bench.common import console

Options = tuple[str, str]

EXPERTS = ("grouped_mm", "batched_mm", "eager")
CACHES = ("dynamic", "static")


class Transformers:
    """`generate()`: greedy, its own batching, end-of-sequence ignored; the best of its options for each workload."""

    name = "transformers"

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        self._model = model.eval()
        self._vocab_size: int = model.config.vocab_size
        self._best: dict[tuple[str, int], Options] = {}

    def decode(self, batch: int) -> float:
        """Tokens per second of `batch` sequences, from the first generated token on."""
        return self._with_best(("decode", batch), lambda options: self._decode(batch, options))

    def prefill(self, n_tokens: int) -> float:
        """Prompt tokens per second, up to the first generated token."""
        return self._with_best(("prefill", n_tokens), lambda options: self._prefill(n_tokens, options))

    @property
    def options(self) -> dict[str, str]:
        """What was fastest: experts implementation and cache, per workload."""
        return {f"{kind}_{size}": " + ".join(options) for (kind, size), options in self._best.items()}

    def _with_best(self, workload: tuple[str, int], run: Callable[[Options], float]) -> float:
        if workload not in self._best:
            # batched_mm copies the weights of every (token, expert) pair: gigabytes a step beyond one sequence.
            candidates = [(e, c) for e, c in product(EXPERTS, CACHES) if workload == ("decode", 1) or e != "batched_mm"]
            speeds = {}
            for options in candidates:
                run(options)
                speeds[options] = run(options)
                console.print(f"  {self.name} {' + '.join(options)}: {speeds[options]:.1f} tokens/s", style="dim")
            self._best[workload] = max(speeds, key=speeds.__getitem__)
        return run(self._best[workload])

    def _decode(self, batch: int, options: Options) -> float:
        stamps: list[float] = []

        def stamp(input_ids: Tensor, scores: Tensor) -> Tensor:
            stamps.append(time.perf_counter())
            return scores

        self._generate(prompts(batch, DECODE_PROMPT, self._vocab_size), 1 + DECODE_STEPS, options, [stamp])
        return batch * DECODE_STEPS / (stamps[-1] - stamps[0])

    def _prefill(self, n_tokens: int, options: Options) -> float:
        prompt = prompts(1, n_tokens, self._vocab_size)
        start = time.perf_counter()
        self._generate(prompt, 1, options, [])
        return n_tokens / (time.perf_counter() - start)

    def _generate(self, prompt_ids: list[list[int]], n_new: int, options: Options, processors: list[Any]) -> None:
        experts, cache = options
        self._model.set_experts_implementation(experts)
        input_ids = torch.tensor(prompt_ids)
        with torch.inference_mode():
            self._model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=n_new, do_sample=False,
                cache_implementation=cache, logits_processor=processors, pad_token_id=0,
            )  # fmt: skip
