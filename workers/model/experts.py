"""The one seam of the model: what the decoder knows of its experts."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from workers.kernels.ops import Delta, Ops


class Experts(Protocol):
    """Computes the expert half of every MoE layer: an `ExpertShard` in one process, an `Exchange` in a cluster.

    Shape legend: T token rows of one micro-batch, D hidden size, K experts per token.
    Not thread-safe: one step loop owns it. Several dispatches may be in flight, each combined once.
    """

    only_launches: bool  # whether dispatch and combine only launch kernels, so that a step with them can be captured

    def begin_step(self, step: int) -> None:
        """The dispatches that follow belong to step `step`; those of a step that failed are not combined any more."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Any:
        """Start the experts of `layer` on the rows and return a handle for `combine`.

        x_TD: normalised hidden states in the compute dtype; must not be written to until combined.
        expert_ids_TK: int64, distinct within a row. weights_TK: float32, sums to 1 over K.
        T may be 0.
        """

    def combine(self, handle: Any) -> Delta:
        """y_TD, in the dtype of x_TD: per row, the weighted sum over its experts, added in expert order in float32.

        The caller owns y_TD and may write to it. Rows that are not added up yet (`Unsummed`) may stand for it where the
        operations of the model's device take them.
        """

    def by(self, ops: Ops) -> Experts | None:
        """The same experts computed by other operations of their device, those that capture; None: not here."""

    def micro_batches(self, n_rows: int) -> int:
        """Into how many micro-batches a step of `n_rows` rows should be cut.

        1 where experts compute in this process. Elsewhere more pays once an exchange takes longer than reading the
        expert weights once more, which is what every cut costs.
        """
