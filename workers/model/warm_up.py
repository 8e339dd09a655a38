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
    """Steps of every size up to `most_rows`, of a prompt and one row that decodes, all of them padding: nothing is
    written or counted."""
    ops, device = model.ops, model.cache.device
    assert isinstance(ops, CudaOps)
    nobody = torch.zeros(1, dtype=torch.int32, device=device)
    experts = model.experts if model.experts.only_launches else Nobody()
    for n in powers_up_to(most_rows)[2:]:
        nowhere_T = torch.full((n,), -1, dtype=torch.int64, device=device)
        sequence_T = torch.zeros(n, dtype=torch.int64, device=device)
        table_SB = torch.zeros(2, 1, dtype=torch.int32, device=device)
        metadata = AttentionMetadata(table_SB, sequence_T, nowhere_T, nowhere_T, (0, n - 1, n))
        last_R = torch.full((1,), n - 1, dtype=torch.int64, device=device)
        model.compute(ops.padded(nobody, 0), sequence_T, metadata, last_R, experts)
