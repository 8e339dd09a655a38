"""Our engine, with the experts in this process or elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.workload import DECODE_PROMPT, DECODE_STEPS, prompts
from cluster.config import Config
from cluster.router.build import build_engine
from cluster.router.engine import Engine
from cluster.router.params import SamplingParams
from workers.model.experts import Experts

CONFIG = Config(kv_cache_mb=64, prefix_cache=False)  # every run is asked the same prompts


class EngineRunner:
    """The step loop as a router runs it: scheduler, model, sampler."""

    def __init__(self, name: str, directory: Path, experts: Experts | None = None) -> None:
        """`experts`: where they are; None: all of them in this process."""
        self.name = name
        self._engine = build_engine(CONFIG, directory, experts)
        self._vocab_size = self._engine.model.spec.vocab_size

    @property
    def engine(self) -> Engine:
        """What is measured."""
        return self._engine

    def decode(self, batch: int, traceparent: str = "") -> float:
        """Tokens per second of `batch` sequences, from the first generated token on. `traceparent`: of all of them."""
        self._submit(prompts(batch, DECODE_PROMPT, self._vocab_size), 1 + DECODE_STEPS, traceparent)
        self._engine.step()  # all prompts fit in one step
        start = time.perf_counter()
        n_tokens = sum(self._step() for _ in range(DECODE_STEPS))
        elapsed = time.perf_counter() - start
        if n_tokens != batch * DECODE_STEPS or self._engine.has_work():
            raise RuntimeError(f"{n_tokens} tokens in {DECODE_STEPS} steps of {batch} sequences")
        return n_tokens / elapsed

    def prefill(self, n_tokens: int) -> float:
        """Prompt tokens per second, up to the first generated token."""
        prompt = prompts(1, n_tokens, self._vocab_size)
        start = time.perf_counter()
        self._submit(prompt, 1)
        while self._engine.has_work():
            self._engine.step()
        return n_tokens / (time.perf_counter() - start)

    def _submit(self, prompt_ids: list[list[int]], n_new: int, traceparent: str = "") -> None:
        params = SamplingParams(n_new, temperature=0.0, ignore_eos=True, traceparent=traceparent)
        for index, ids in enumerate(prompt_ids):
            self._engine.submit(str(index), ids, params)

    def _step(self) -> int:
        return sum(len(output.token_ids) for output in self._engine.step())
