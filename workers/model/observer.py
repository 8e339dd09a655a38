"""Who may look on while the gates choose: the decoder tells it, layer by layer, what a step asks of its experts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RoutingObserver(Protocol):
    """Hears of every choice of a step that is computed layer by layer.

    Shape legend: T token rows of one micro-batch, K experts per token. Called by the step loop: it must not wait.
    """

    def chosen(self, layer: int, q_start: tuple[int, ...] | None, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """What the gate of `layer` chose, best first; the tensors are reused, so they are copied or forgotten.

        q_start: the rows of sequence s are q_start[s]:q_start[s + 1], consecutive tokens of it. None in the last layer
        where only the rows whose logits are wanted go on.
        """
