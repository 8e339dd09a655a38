"""The kernels of prompts, compiled before there is one: the first prompts of every length would wait for them, and with
them everybody whose tokens the same steps compute. Also shows at once if the largest step finds no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cuda.ops import CudaOps
from workers.kernels.ops import AttentionMetadata, Delta
from workers.kernels.sizes import powers_up_to
from workers.model.decoder import Decoder


class Nobody:
    """Experts that are elsewhere and are not asked."""

    only_launches = True

    def begin_step(self, step: int) -> None:
        """Nothing."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """No rows go anywhere."""
        return x_TD

    def combine(self, handle: Tensor) -> Delta:
        """What would be added."""
        return torch.zeros_like(handle)

    def by(self, ops: object) -> None:
        """Nothing is captured."""

    def micro_batches(self, n_rows: int) -> int:
        """One."""
        return 1


def warm_up(model: Decoder, most_rows: int) -> None:
    """Steps of every size up to `most_rows`, of a prompt and one row that decodes. They read block 0 of the cache for
    every block, whatever lies there; nothing is written, no expert is asked, nothing is counted."""
    ops, device = model.ops, model.cache.device
    assert isinstance(ops, CudaOps)
    nobody = torch.zeros(1, dtype=torch.int32, device=device)
    experts = model.experts if model.experts.only_launches else Nobody()
    for n in powers_up_to(most_rows)[2:]:
        nowhere_T = torch.full((n,), -1, dtype=torch.int64, device=device)
        token_T, position_T = torch.zeros(n, dtype=torch.int64, device=device), torch.arange(n, device=device)
        sequence_T = (position_T == n - 1).long()
        table_SB = torch.zeros(2, -(-n // model.cache.block_size), dtype=torch.int32, device=device)
        metadata = AttentionMetadata(table_SB, sequence_T, position_T, nowhere_T, (0, n - 1, n))
        model.compute(ops.padded(nobody, 0), token_T, metadata, position_T[-1:], experts)
