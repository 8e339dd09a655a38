"""The sampler of `sampler`, on a GPU: the same stages in the same order, by the same rules, and the same tokens.

What rows have of their own (bias, penalties, bans, masks) is written to a copy of the logits; all rows are then drawn
from by one kernel. Nothing waits: the tokens come to the host when the step is complete.

Shape legend: R draws, V vocabulary, N entries.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import RequestError
from cluster.router.compute import Draw, Drawn
from cluster.router.params import TokenLogprobs
from cluster.router.sampling_state import GREEDY_BELOW
from cluster.router.sequence import Sequence
from cluster.router.token_mask import TokenMask
from cluster.router.token_masks import TokenMasks
from workers.device import to_device, to_host
from workers.kernels.cuda.sampling import Draws, draw

_Floats = NDArray[np.float32]


class DeviceSampler:
    """Draws tokens where the logits are. One per step loop."""

    def __init__(self, vocab_size: int, last_N: Tensor) -> None:
        """last_N: int32 on the device; the token of draw i is left at i."""
        self._last_N = last_N
        self._masks = TokenMasks(vocab_size)
        self._ints, self._floats = _Columns(), _Columns()

    def start(self, logits_RV: Tensor, draws: Items[Draw]) -> Pending:
        """Launch the draws of a step; logits float32, contiguous."""
        masks = self._masks.begin([draw.sequence for draw in draws]).result()  # while the device computes
        broken = {i: mask for i, mask in enumerate(masks) if isinstance(mask, RequestError)}
        usable = [(draws[i].row, mask) for i, mask in enumerate(masks) if isinstance(mask, TokenMask)]
        adjusted_RV = _adjusted(logits_RV, draws, usable)
        ints = np.array([(d.row, i, _signed(d.sequence.params.seed), d.sequence.n_known, d.sequence.params.top_k)
                         for i, d in enumerate(draws)], np.int64).reshape(-1, 5)  # fmt: skip
        floats = np.array([(d.sequence.params.temperature, d.sequence.params.top_p, d.sequence.params.min_p)
                           for d in draws], np.float64).reshape(-1, 3)  # fmt: skip
        if (floats[:, 0] < GREEDY_BELOW).all():
            ints[:, 2:] = 0  # nobody asks for them, and what did not change need not be copied
        row_R, index_R, seed_R, position_R, top_k_R = self._ints.on_device(ints, logits_RV.device)
        temperature_R, top_p_R, min_p_R = self._floats.on_device(floats, logits_RV.device)
        how = Draws(row_R, index_R, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R)
        token_R = draw(adjusted_RV, how, self._last_N)
        return Pending(token_R, _scores(logits_RV, row_R, token_R, draws), broken)


class _Columns:
    """A table's columns on the device, copied there when they are others than the last time."""

    def __init__(self) -> None:
        self._host: NDArray[np.generic] = np.empty(0)
        self._device: Tensor = torch.empty(0)

    def on_device(self, table: NDArray[np.generic], device: torch.device) -> Tensor:
        """[columns, rows]."""
        if not np.array_equal(table, self._host):
            self._host, self._device = table, to_device(torch.from_numpy(table.T.copy()), device)
        return self._device


@dataclass(slots=True)
class _Scores:
    """Log-probabilities of the draws that want them."""

    index: list[int]
    n_top: list[int]
    logprob_N: Tensor  # float64: of the token
    top_id_NK: Tensor
    top_logprob_NK: Tensor  # float64


class Pending:
    """Draws under way: on their way to the host already."""

    def __init__(self, token_R: Tensor, scores: _Scores | None, broken: dict[int, RequestError]) -> None:
        self._token_R = to_host(token_R)
        self._scores = scores
        self._broken = broken
        self._event = torch.cuda.current_stream().record_event() if token_R.is_cuda else None

    def result(self) -> list[Drawn]:
        """What was drawn; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        logprobs = self._logprobs()
        return [Drawn(self._token(i, token), logprobs.get(i)) for i, token in enumerate(self._token_R.tolist())]

    def _token(self, index: int, token: int) -> int | RequestError:
        if index in self._broken:
            return self._broken[index]
        if token < 0:
            return RequestError("the model gave logits that are not finite", code="internal_error", status=500)
        return token

    def _logprobs(self) -> dict[int, TokenLogprobs]:
        scores = self._scores
        if scores is None:
            return {}
        tops = zip(scores.top_id_NK.tolist(), scores.top_logprob_NK.tolist(), strict=True)
        return {
            index: TokenLogprobs(logprob, tuple(zip(ids[:n], values[:n], strict=True)))
            for index, n, logprob, (ids, values) in zip(
                scores.index, scores.n_top, scores.logprob_N.tolist(), tops, strict=True
            )
        }


def _adjusted(logits_RV: Tensor, draws: Items[Draw], masks: Items[tuple[int, TokenMask]]) -> Tensor:
    """The logits with bias, penalties and masks, each of a row; themselves where no draw has any."""
    biased, seen = [], []
    for row, sequence in draws:
        state = sequence.sampling
        if len(state.bias_B):
            biased.append((row, state.bias_ids_B, state.bias_B))
        if state.seen is not None:
            seen.append((row, sequence))
    if not (biased or seen or masks):
        return logits_RV
    vocab, device = logits_RV.shape[1], logits_RV.device
    logits_RV = logits_RV.clone()
    flat = logits_RV.view(-1)

    def entries(rows: Items[tuple[int, NDArray[np.int64]]]) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate([row * vocab + ids for row, ids in rows])), device)

    def values(parts: Items[_Floats]) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate(parts).astype(np.float32)), device)

    if biased:
        at = entries([(row, ids) for row, ids, _ in biased])
        flat[at] = flat[at] + values([bias for _, _, bias in biased])
    if seen:
        at, counts = _penalties(seen, entries, values)
        repetition, frequency, presence = (values(parts) for parts in _strengths(seen))
        before = flat[at]
        after = torch.where(before > 0, before / repetition, before * repetition)
        after = after - frequency * counts
        flat[at] = after - presence * (counts > 0)
    if allowed := [(row, mask.ids_I) for row, mask in masks if mask.allows]:
        at = entries(allowed)
        kept = flat[at]
        logits_RV[to_device(torch.tensor([row for row, _ in allowed]), device)] = float("-inf")
        flat[at] = kept
    if banned := [(row, mask.ids_I) for row, mask in masks if not mask.allows]:
        flat[entries(banned)] = float("-inf")
    return logits_RV


def _penalties(seen: Items[tuple[int, Sequence]], entries: object, values: object) -> tuple[Tensor, Tensor]:
    """Where the tokens seen are, and how often each is in the output."""
    assert callable(entries) and callable(values)
    states = [(row, state) for row, sequence in seen if (state := sequence.sampling.seen) is not None]
    at: Tensor = entries([(row, state.ids_N) for row, state in states])
    counts: Tensor = values([state.counts_N for _, state in states])
    return at, counts


def _strengths(seen: Items[tuple[int, Sequence]]) -> tuple[list[_Floats], list[_Floats], list[_Floats]]:
    """Repetition, frequency and presence penalty of every entry."""
    lengths = [len(state.ids_N) for _, sequence in seen if (state := sequence.sampling.seen) is not None]
    every = [(s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty) for _, s in seen]
    columns: list[list[_Floats]] = [
        [np.full(n, value, np.float32) for n, value in zip(lengths, column, strict=True)]
        for column in zip(*every, strict=True)
    ]
    repetition, frequency, presence = columns
    return repetition, frequency, presence


def _scores(logits_RV: Tensor, row_R: Tensor, token_R: Tensor, draws: Items[Draw]) -> _Scores | None:
    """Log-probabilities of the raw distribution, summed in float64; of equal logits the lower id comes first."""
    index = [i for i, (_, sequence) in enumerate(draws) if sequence.params.logprobs is not None]
    if not index:
        return None
    n_top = [draws[i].sequence.params.logprobs or 0 for i in index]
    at = to_device(torch.tensor(index), logits_RV.device)
    logits_NV = logits_RV.index_select(0, row_R.index_select(0, at))
    largest_N1 = logits_NV.amax(1, keepdim=True)
    sum_N1 = (logits_NV - largest_N1).exp().sum(1, keepdim=True, dtype=torch.float64)
    log_sum_N1 = largest_N1.double() + sum_N1.log()
    token_N1 = token_R.index_select(0, at).long().clamp_min(0)[:, None]
    logprob_N = (logits_NV.gather(1, token_N1).double() - log_sum_N1)[:, 0]
    bits_NV = (logits_NV + 0.0).view(torch.int32)
    ascending_NV = (bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)).long()  # as the floats do
    vocab = logits_NV.shape[1]
    keys_NV = ascending_NV * vocab + (vocab - 1 - torch.arange(vocab, device=logits_RV.device))
    top_NK = keys_NV.topk(min(max(n_top), vocab), dim=1).indices
    top_logprob_NK = logits_NV.gather(1, top_NK).double() - log_sum_N1
    return _Scores(index, n_top, to_host(logprob_N), to_host(top_NK), to_host(top_logprob_NK))


def _signed(seed: int) -> int:
    """The 64 bits of an unsigned number, as int64 has them."""
    return seed - 2**64 if seed >= 2**63 else seed
