"""Our engine on a random model: tokens a second of decoding, milliseconds of a prompt."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch

from cluster.bench.gpu.random_model import RandomModel
from cluster.config import Config
from cluster.router.device_compute import DeviceCompute
from cluster.router.engine import Engine
from cluster.router.params import SamplingParams

CONTEXT = 512  # tokens a sequence has in the last step that is timed
STEPS = 24  # timed


class OurEngine:
    """The step loop as a router runs it: scheduler, captured steps, tokens drawn on the device."""

    def __init__(self, model: RandomModel, max_sequences: int, max_batch_tokens: int) -> None:
        config = Config(max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
        self._vocab_size = model.spec.vocab_size
        self._n_submitted = 0
        began = time.perf_counter()
        compute = DeviceCompute(model.decoder, max_sequences, max_batch_tokens, max_batch_tokens)
        self.capture_seconds = time.perf_counter() - began
        self._engine = Engine(model.decoder, config, compute=compute)

    def decode(self, batch: int, temperature: float = 0.0) -> float:
        """Tokens per second of `batch` sequences, on the wall's clock, scheduling and drawing included."""
        self._submit(batch, CONTEXT - STEPS - 3, 4 + STEPS, temperature)
        n_tokens, stamps = 0, []
        while self._engine.has_work():
            given = sum(len(output.token_ids) for output in self._engine.step())
            n_tokens += given
            if given == batch:
                stamps.append(time.perf_counter())
        if n_tokens != batch * (4 + STEPS):
            raise RuntimeError(f"{n_tokens} tokens from {batch} sequences, {4 + STEPS} each")
        between = [after - before for before, after in pairwise(stamps[1:])]
        return batch / statistics.median(between)

    def prefill(self, n_tokens: int) -> float:
        """Milliseconds from a prompt of `n_tokens` to its first token."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._submit(1, n_tokens, 1, 0.0)
        while self._engine.has_work():
            self._engine.step()
        return (time.perf_counter() - began) * 1000

    def _submit(self, batch: int, n_prompt: int, n_new: int, temperature: float) -> None:
        self._n_submitted += 1  # other prompts each time: none is in the cache already
        draw = torch.Generator().manual_seed(self._n_submitted)
        ids = torch.randint(10, self._vocab_size, (batch, n_prompt), generator=draw).tolist()
        for index, prompt_ids in enumerate(ids):
            params = SamplingParams(max_tokens=n_new, temperature=temperature, ignore_eos=True, seed=index)
            self._engine.submit(str(index), prompt_ids, params)
