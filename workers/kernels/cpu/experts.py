"""What the kernels of a layer's experts are given."""

from __future__ import annotations

from torch import Tensor

from workers.kernels.cpu import arguments, kernel
from workers.kernels.experts import LayerExperts


def n_places(n_experts: int, most_pairs: int) -> int:
    """Numbers that the first kernel of a layer's experts writes for the second."""
    return 2 * (n_experts + 1) + 2 * most_pairs


def expert_arguments(
    layer: LayerExperts, hidden_P2F: Tensor, places: Tensor, most_pairs: int
) -> tuple[arguments.Pairs, arguments.Experts]:
    """What the two kernels of a layer's experts are given, but for the pairs, their rows and the results.

    places: int64 [`n_places`], room for what the first tells the second.
    """
    (table, counters), active = (layer.address_E2.data_ptr(), layer.rows_E.data_ptr()), places.data_ptr()
    starts = active + 8 * (layer.n_experts + 1)
    token_rows = starts + 8 * (layer.n_experts + 1)
    hidden, hidden_rows = hidden_P2F.data_ptr(), token_rows + 8 * most_pairs
    first = arguments.Pairs(
        token=0, expert=0, n_pairs=0, n_experts=layer.n_experts, table=table, counters=counters, x=0,
        x_stride=4 * layer.hidden_size, hidden=hidden, hidden_stride=8 * layer.ffn_size, starts=starts,
        token_rows=token_rows, hidden_rows=hidden_rows, active=active, missing=0,
    )  # fmt: skip
    second = arguments.Experts(
        table=table, active=active, starts=starts, token_rows=token_rows, hidden=hidden,
        hidden_stride=8 * layer.ffn_size, hidden_rows=hidden_rows, y=0, d=layer.hidden_size, f=layer.ffn_size,
        kind=kernel.kinds()[layer.format.dtype],
    )  # fmt: skip
    return first, second
