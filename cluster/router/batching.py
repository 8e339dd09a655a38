"""From scheduled chunks to the tensors of a step.

Shape legend: T token rows, S sequences, B blocks of the longest table, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from cluster.router.scheduler import Chunk
from workers.model.batch import Batch


def logits_wanted(chunk: Chunk) -> int:
    """How many rows at the end of the chunk are to give logits.

    The last one, where the next token comes from it; for log-probabilities of the prompt every row that scores a
    prompt token which has no score yet (a preempted prompt is computed anew, but scored once); for routing every row of
    the answer's tokens of which it is not known yet.
    """
    sequence, n = chunk
    if sequence.prompt_logprobs is not None and sequence.wants_prompt_logprobs:
        return max(0, min(n, sequence.computed + n - (len(sequence.prompt_logprobs) - 1)))
    last = 1 if chunk.completes else 0
    return max(last, min(n, sequence.computed + n - sequence.routed)) if sequence.params.routing else last


def make_batch(chunks: Items[Chunk], wanted_S: Items[int], block_size: int) -> Batch:
    """The batch that computes the chunks and gives the logits of the last `wanted_S[s]` rows of each.

    A token that a step under way will give has the id -1.
    """
    tokens: list[int] = []
    for sequence, n in chunks:
        known_ids = sequence.tokens[sequence.computed : sequence.computed + n]
        tokens += [*known_ids, *[-1] * (n - len(known_ids))]
    n_S = np.array([n for _, n in chunks])
    first_S = np.array([sequence.computed for sequence, _ in chunks])
    context_S = first_S + n_S
    table_SB = np.zeros((len(chunks), (context_S.max() - 1) // block_size + 1), np.int32)
    for blocks_B, (sequence, _) in zip(table_SB, chunks, strict=True):
        known = sequence.blocks[: len(blocks_B)]
        blocks_B[: len(known)] = known
    ends_S = n_S.cumsum()
    sequence_T = np.arange(len(chunks)).repeat(n_S)
    row_T = np.arange(len(tokens))
    positions_T = row_T + (context_S - ends_S)[sequence_T]
    block_T, offset_T = np.divmod(positions_T, block_size)
    return Batch(
        token_ids_T=torch.tensor(tokens),
        positions_T=torch.from_numpy(positions_T),
        slots_T=torch.from_numpy(table_SB[sequence_T, block_T].astype(np.int64) * block_size + offset_T),
        q_start=(0, *ends_S.tolist()),
        context_S=torch.from_numpy(context_S.astype(np.int32)),
        block_table_SB=torch.from_numpy(table_SB),
        routing=any(sequence.params.routing for sequence, _ in chunks),
        logit_rows_R=torch.from_numpy(np.flatnonzero(row_T >= (ends_S - np.array(wanted_S))[sequence_T])),
    )
