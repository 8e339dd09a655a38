"""What sampling keeps of one sequence from step to step, so that a step costs no more than what changed.

Shape legend: V vocabulary, N distinct tokens seen, B biased tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.router.grammar import Grammar
from cluster.router.params import SamplingParams
from cluster.router.token_mask import TokenMask

GREEDY_BELOW = 1e-5  # a temperature that float32 logits cannot be divided by


class SamplingState:
    """The constant parts of the parameters as arrays, and the tokens seen so far where penalties need them."""

    __slots__ = (
        "allowed",
        "bias_B",
        "bias_ids_B",
        "grammar",
        "greedy",
        "plain",
        "random",
        "random_from",
        "seed",
        "seen",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        emitted_ids: Sequence[int],
        grammar: Grammar | None = None,
    ) -> None:
        self.grammar = grammar
        self.allowed = TokenMask.only(params.allowed_ids) if params.allowed_ids else None
        self.seed = params.seed
        self.greedy = params.temperature < GREEDY_BELOW
        self.random: NDArray[np.float64] = np.empty(0)  # drawn ahead: the uniforms of positions random_from, ...
        self.random_from = 0
        penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.seen = SeenTokens(prompt_ids, emitted_ids) if penalised else None
        self.bias_ids_B = np.fromiter(params.logit_bias.keys(), np.int64)
        self.bias_B = np.fromiter(params.logit_bias.values(), np.float32)
        # Plain: the likeliest token, whatever came before.
        free = grammar is None and not params.allowed_ids and not params.bad_words
        self.plain = free and self.greedy and not penalised and not params.logit_bias and params.min_tokens == 0


class SeenTokens:
    """The distinct tokens of prompt and output, and how often each is in the output; grows by one token in O(1)."""

    __slots__ = ("_counts", "_ids", "_index")

    def __init__(self, prompt_ids: Sequence[int], emitted_ids: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt_ids)
        self._index = {token: i for i, token in enumerate(distinct)}
        self._ids: NDArray[np.int64] = np.zeros(len(distinct) + 64, np.int64)
        self._counts: NDArray[np.float32] = np.zeros(len(distinct) + 64, np.float32)
        self._ids[: len(distinct)] = list(distinct)
        for token in emitted_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more emitted token."""
        i = self._index.setdefault(token, len(self._index))
        if i == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[i] = token
        self._counts[i] += 1

    @property
    def ids_N(self) -> NDArray[np.int64]:
        return self._ids[: len(self._index)]

    @property
    def counts_N(self) -> NDArray[np.float32]:
        """How often the output has each of `ids_N`; 0 for a token that only the prompt has."""
        return self._counts[: len(self._index)]
