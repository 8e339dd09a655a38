"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of several sequences, concatenated: one row per sequence that decodes, more for one that prefills.

    Shape legend: T token rows, S sequences, B blocks of the longest table, R rows whose logits are wanted.
    Every tensor lives on the host; the model moves them to its device once per step.
    """

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64, position in the sequence, from 0
    slots_T: Tensor  # int64, where the row's K and V go: block * block_size + offset
    q_start: tuple[int, ...]  # S + 1 prefix sums: the rows of sequence s are q_start[s]:q_start[s + 1], never empty
    context_S: Tensor  # int32, KV tokens of the sequence including its rows of this batch
    block_table_SB: Tensor  # int32, block i of a sequence holds its tokens from i * block_size on; padded anyhow
    logit_rows_R: Tensor  # int64, ascending; the last row of a sequence to sample from, all of them for prompt logprobs
    routing: bool = False  # whether `Decoder.routing` will be asked for the experts of these rows

    @property
    def n_rows(self) -> int:
        """T."""
        return self.q_start[-1]

    def split(self, n: int) -> tuple[Batch, ...]:
        """At most `n` micro-batches of about equal size, in row order; their logits concatenate to those of the whole.

        A cut may fall inside a sequence: its second part then sees the K and V of the first, because the model
        attends to the micro-batches in order within every layer.
        """
        n = min(n, self.n_rows)
        cuts = [self.n_rows * i // n for i in range(n + 1)]
        return tuple(self._rows(a, b) for a, b in pairwise(cuts)) if n > 1 else (self,)

    def _rows(self, begin: int, end: int) -> Batch:
        """The rows begin:end as a batch of their own."""
        starts, ends = self.q_start[:-1], self.q_start[1:]
        first = next(s for s, stop in enumerate(ends) if stop > begin)
        last = next(s for s, stop in enumerate(ends) if stop >= end)
        context_S = self.context_S[first : last + 1].clone()
        context_S[-1] -= ends[last] - end  # rows of the last sequence that a later micro-batch computes
        wanted = self.logit_rows_R[(self.logit_rows_R >= begin) & (self.logit_rows_R < end)]
        return Batch(
            token_ids_T=self.token_ids_T[begin:end],
            positions_T=self.positions_T[begin:end],
            slots_T=self.slots_T[begin:end],
            q_start=(*(max(start, begin) - begin for start in starts[first : last + 1]), end - begin),
            context_S=context_S,
            block_table_SB=self.block_table_SB[first : last + 1],
            logit_rows_R=wanted - begin,
            routing=self.routing,
        )
