"""From logits to tokens, each sequence by its own parameters.

One pass in numpy over the rows of a step. A row (some 200 KB) is worked on while it is in the core's cache, pays only
for the stages that its sequence asks for, and never looks at another row: so a request gives the same tokens alone and
in a crowd. The order of the stages: logit bias, penalties, what may come next (`token_masks`), temperature, top-k,
top-p, min-p, draw. Where a few tokens may come next, the stages after that see these alone.

Shape legend: S sequences, V vocabulary, C candidates, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from cluster.errors import RequestError
from cluster.router.params import SamplingParams
from cluster.router.philox import uniforms
from cluster.router.sampling_state import SamplingState
from cluster.router.sequence import Sequence
from cluster.router.token_mask import TokenMask
from cluster.router.token_masks import Begun, TokenMasks

Row = NDArray[np.float32]
Rows = NDArray[np.float32]

_BLOCK = 256  # entries summed at a time on the way to the drawn one
_DRAWN_AHEAD = 64  # positions whose random numbers are made at once: Philox costs as much for one as for hundreds


class Sampler:
    """Chooses the next token of each sequence. Owns scratch memory, so one per step loop."""

    def __init__(self, vocab_size: int) -> None:
        self._weights = np.zeros(-(-vocab_size // _BLOCK) * _BLOCK, np.float32)
        self._masks = TokenMasks(vocab_size)

    def begin(self, sequences: Items[Sequence]) -> Begun:
        """Begin what `sample` of the same sequences needs to know, before their logits are there."""
        return self._masks.begin(sequences)

    def sample(
        self, logits_SV: Rows, sequences: Items[Sequence], begun: Begun | None = None
    ) -> list[int | RequestError]:
        """One token per row, or why there is none: what is wrong with one row is not the others' matter.

        Leaves `logits_SV` as it is. The caller appends the token to the sequence (`Sequence.append`) before it samples
        again. `begun`: what `begin` gave for this step; None: it is begun now.
        """
        masks = (begun or self.begin(sequences)).result()
        best_S = logits_SV.argmax(axis=1)
        tokens: list[int | RequestError] = best_S.tolist()
        finite: list[bool] = np.isfinite(logits_SV[range(len(tokens)), best_S]).tolist()
        choosing = [i for i, sequence in enumerate(sequences) if finite[i] and not sequence.sampling.plain]
        if choosing:
            draw_ahead([sequences[i] for i in choosing])
        for i in choosing:
            mask = masks[i]
            tokens[i] = mask if isinstance(mask, RequestError) else self._choose(logits_SV[i], sequences[i], mask)
        unusable = RequestError("the model gave logits that are not finite", code="internal_error", status=500)
        return [token if ok else unusable for token, ok in zip(tokens, finite, strict=True)]

    def _choose(self, logits_V: Row, sequence: Sequence, mask: TokenMask | None) -> int:
        logits_C, ids_C = candidates(adjust(logits_V, sequence), mask)
        state = sequence.sampling
        if state.greedy:
            chosen = int(logits_C.argmax())
        else:
            n = len(logits_C)
            weights = self._weights[: -(-n // _BLOCK) * _BLOCK]
            weights[n:] = 0
            weigh(logits_C, sequence.params, weights[:n])
            chosen = draw(weights, state.random[len(sequence.tokens) - state.random_from])
        return chosen if ids_C is None else int(ids_C[chosen])


def draw_ahead(sequences: Items[Sequence]) -> None:
    """Make the random numbers of the next positions of every sequence that has none left."""
    lacking: list[tuple[SamplingState, int]] = []
    for sequence in sequences:
        state, position = sequence.sampling, len(sequence.tokens)
        if not state.greedy and not 0 <= position - state.random_from < len(state.random):
            lacking.append((state, position))
    if not lacking:
        return
    seeds_N = np.array([state.seed for state, _ in lacking for _ in range(_DRAWN_AHEAD)], np.uint64)
    positions_N = np.array([first + i for _, first in lacking for i in range(_DRAWN_AHEAD)], np.uint64)
    random = uniforms(seeds_N, positions_N).reshape(-1, _DRAWN_AHEAD)
    for (state, position), numbers in zip(lacking, random, strict=True):
        state.random, state.random_from = numbers, position


def adjust(logits_V: Row, sequence: Sequence) -> Row:
    """Logit bias and penalties; the given row where there is none of them."""
    state, params = sequence.sampling, sequence.params
    if not (len(state.bias_B) or state.seen):
        return logits_V
    logits_V = logits_V.copy()
    if len(state.bias_B):
        logits_V[state.bias_ids_B] += state.bias_B
    if state.seen:
        ids, counts = state.seen.ids_N, state.seen.counts_N
        seen = logits_V[ids]
        penalty = np.float32(params.repetition_penalty)
        seen = np.where(seen > 0, seen / penalty, seen * penalty)
        seen -= np.float32(params.frequency_penalty) * counts
        seen -= np.float32(params.presence_penalty) * (counts > 0)
        logits_V[ids] = seen
    return logits_V


def candidates(logits_V: Row, mask: TokenMask | None) -> tuple[Row, NDArray[np.int64] | None]:
    """Logits to choose from, in the order of their token ids, and those; None: they are the whole vocabulary's."""
    if mask is None:
        return logits_V, None
    if mask.allows:
        return logits_V[mask.ids_I], mask.ids_I
    logits_V = logits_V.copy()
    logits_V[mask.ids_I] = -np.inf
    return logits_V, None


def weigh(logits_V: Row, params: SamplingParams, out_V: Row) -> None:
    """Write the probabilities to draw from, up to a factor: the largest is 1, what the filters remove is 0."""
    np.subtract(logits_V, logits_V.max(), out=out_V)
    out_V /= np.float32(params.temperature)
    n = len(out_V)
    likely = out_V >= np.partition(out_V, n - params.top_k)[n - params.top_k] if 0 < params.top_k < n else None
    np.exp(out_V, out=out_V)
    if likely is not None:
        out_V *= likely
    if params.top_p < 1:
        out_V *= out_V >= nucleus(out_V, params.top_p)
    if params.min_p > 0:
        out_V *= out_V >= np.float32(params.min_p)


def nucleus(weights_V: Row, top_p: float) -> np.float32:
    """The smallest weight among the likeliest tokens that together reach `top_p` of the mass."""
    mass = top_p * weights_V.sum(dtype=np.float64)
    for least in (1e-3, 1e-5, 0.0):  # usually a few hundred tokens are all that is needed: sorting V takes far longer
        near = weights_V[weights_V >= least]
        if near.sum(dtype=np.float64) >= mass:
            break
    descending = np.sort(near)[::-1]
    return np.float32(descending[_first_above(np.cumsum(descending, dtype=np.float64), mass, side="left")])


def draw(weights_V: Row, uniform: float) -> int:
    """Invert the cumulative distribution, in float64 and in the order of token ids.

    In that order a last-bit difference of the logits (another batch size takes another matrix product) moves the
    border between two tokens by as little; in the order of probability it could swap them. V is a multiple of _BLOCK.
    """
    blocks_B = weights_V.reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    ends_B = np.cumsum(blocks_B)
    target = uniform * ends_B[-1]
    block = _first_above(ends_B, target)
    begin = block * _BLOCK
    ends = np.cumsum(weights_V[begin : begin + _BLOCK], dtype=np.float64)
    return begin + _first_above(ends, target - (ends_B[block] - blocks_B[block]))


def _first_above(ends: NDArray[np.float64], target: float, side: str = "right") -> int:
    """The first index whose cumulative weight exceeds `target` (reaches it, for side="left").

    When rounding puts `target` beyond the end: the last index of positive weight.
    """
    index = int(np.searchsorted(ends, target, side=side))  # type: ignore[call-overload]
    return index if index < len(ends) else int(np.searchsorted(ends, ends[-1], side="left"))
