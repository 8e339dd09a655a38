"""The experts of one layer: grouped SwiGLU over the (token, expert) pairs of a batch.

Legend: T token rows, P pairs, K choices a token, E experts, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels import native, reference
from workers.kernels.linear import apart, is_fast, with_unit_stride
from workers.kernels.native import DOWN_UNIT, FEW_ROWS


class LayerExperts:
    """The expert weights of one layer that live on one device, and the products with them.

    On the CPU in float32 all experts go through the compiled kernels in one call, but for those with many rows and
    weights of float32, which go through BLAS. Everything else is plain torch. Not thread-safe: `ExpertShard` locks
    around every call.
    """

    def __init__(
        self,
        n_experts: int,
        hidden_size: int,
        ffn_size: int,
        device: torch.device,
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` of the rows; `weight_dtype`: the same, which None means, or one that `linear.kept` names."""
        self.n_experts = n_experts
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.device = device
        self.dtype = dtype
        self.weight_dtype = weight_dtype or dtype
        #: int64 [E]: the rows each expert computed since its weights came.
        self.rows_E = torch.zeros(n_experts, dtype=torch.int64)
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._table_E2 = torch.zeros(n_experts, 2, dtype=torch.int64)  # addresses of w13 and w2; 0: not held
        self.has_kernels = device.type == "cpu" and dtype == torch.float32 and native.takes(self.weight_dtype)
        # Panels are as fast as a BLAS, and need no float32 weights; where these are there, the BLAS has been tuned for
        # more processors.
        self._most_rows = FEW_ROWS if self.weight_dtype == torch.float32 else native.MANY_ROWS
        self.expert_bytes = 3 * hidden_size * ffn_size * self.weight_dtype.itemsize

    @property
    def held(self) -> frozenset[int]:
        """The experts that have weights here."""
        return frozenset(self._weights)

    @property
    def addresses(self) -> tuple[int, int]:
        """Where a kernel finds the addresses of each expert's weights, and `rows_E`."""
        return self._table_E2.data_ptr(), self.rows_E.data_ptr()

    @property
    def weights(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """w13 and w2 of the experts that have weights here."""
        return self._weights

    def put(self, expert: int, w13_2FD: Tensor, w2_DF: Tensor) -> None:
        """Give `expert` its weights: w1 (gate) over w3 (up), and w2 (down); contiguous. Kept, not copied."""
        self._weights[expert] = (w13_2FD, w2_DF)
        self._table_E2[expert] = torch.tensor([w13_2FD.data_ptr(), w2_DF.data_ptr()])
        self.rows_E[expert] = 0

    def drop(self, expert: int) -> None:
        """Forget the weights of `expert`."""
        del self._weights[expert]
        self._table_E2[expert] = 0

    def missing(self, expert_ids: Tensor) -> list[int]:
        """The experts among `expert_ids` that have no weights here, ascending."""
        return sorted(set(expert_ids.flatten().tolist()) - self.held)

    def forward(self, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """`y[p] = expert(expert_P[p])(x[token_P[p]])`, unweighted; pairs ascend by expert. Returns [P, D].

        Raises KeyError when an expert is not held.
        """
        if not self.has_kernels or not is_fast(x_TD) or len(token_P) == 0:
            self._count(expert_P)
            return reference.grouped_swiglu(x_TD, token_P, expert_P, self._weights)
        token_P = token_P.to(torch.int64)
        plan = self._plan(x_TD, expert_P, token_P=token_P)
        return self._pairs(plan, token_P)

    def forward_combined(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over each token's experts, added in expert order in float32. Returns [T, D], dtype of x.

        Raises KeyError when an expert is not held.
        """
        n_tokens, choices = expert_ids_TK.shape
        if not self.has_kernels or not is_fast(x_TD) or n_tokens == 0:
            order_P = torch.argsort(expert_ids_TK.flatten(), stable=True)
            token_P = order_P // choices
            y_PD = self.forward(x_TD, token_P, expert_ids_TK.flatten()[order_P])
            return reference.combine(y_PD, token_P, weights_TK.flatten()[order_P], n_tokens).to(x_TD.dtype)
        weights_TK = weights_TK.contiguous()
        plan = self._plan(x_TD, expert_ids_TK, choices=choices)
        if plan.most_rows <= FEW_ROWS:
            return self._combined(plan, weights_TK)
        token_P = plan.order_P // choices
        y_PD = self._pairs(plan, token_P)
        return combine(y_PD, token_P, weights_TK.flatten()[plan.order_P], n_tokens)

    def _count(self, expert_P: Tensor) -> None:
        """Add the pairs to the rows computed; refuse pairs of experts that are not held."""
        if missing := self.missing(expert_P):
            raise KeyError(*missing)
        self.rows_E += torch.bincount(expert_P.to("cpu", torch.int64), minlength=self.n_experts)

    def _plan(self, x_TD: Tensor, experts: Tensor, token_P: Tensor | None = None, choices: int = 1) -> _Plan:
        """Sort the pairs by expert. Pair p takes row `token_P[p]`, or `p // choices` where that is not given."""
        x_TD = with_unit_stride(x_TD)
        experts = experts.to(torch.int64).contiguous()
        token_P = token_P.contiguous() if token_P is not None else None
        n_pairs = experts.numel()
        in_panels = n_pairs > FEW_ROWS and self._most_rows > FEW_ROWS
        if in_panels:
            x_TD = apart(x_TD)
        hidden_PF = native.rows_apart(n_pairs, self.ffn_size) if in_panels else torch.empty(n_pairs, self.ffn_size)
        plan = _Plan(x_TD, n_pairs, hidden_PF, _Scratch(n_pairs, self.n_experts))
        at = plan.scratch
        native.plan(
            1,
            *(experts.data_ptr(), n_pairs, self.n_experts, self._table_E2.data_ptr(), self.rows_E.data_ptr()),
            *(0 if token_P is None else token_P.data_ptr(), choices, x_TD.data_ptr(), 4 * x_TD.stride(0)),
            *(plan.hidden_PF.data_ptr(), 4 * plan.hidden_PF.stride(0)),
            *(at.result, at.starts, at.order, at.token_rows, at.hidden_rows),
        )
        plan.most_rows, missing = at.values[:2].tolist()
        if missing:
            raise KeyError(*self.missing(experts))
        return plan

    def _arguments(self, plan: _Plan, out: Tensor) -> tuple[int, ...]:
        """What `experts_pairs` and `experts_combined` both begin with."""
        at = plan.scratch
        return (
            *(self.hidden_size, self.ffn_size, self.n_experts, self._most_rows, self._table_E2.data_ptr()),
            *(at.starts, at.token_rows, at.hidden_rows, plan.hidden_PF.data_ptr(), out.data_ptr()),
            *(native.KINDS[self.weight_dtype], 4 * plan.hidden_PF.stride(0)),
        )

    def _combined(self, plan: _Plan, weights_TK: Tensor) -> Tensor:
        """The weighted sums, in one kernel."""
        n_tokens, choices = weights_TK.shape
        out_TD = torch.empty(n_tokens, self.hidden_size)
        team = native.team(self.expert_bytes)
        buffers = torch.empty(team, FEW_ROWS * DOWN_UNIT)
        native.experts_combined(
            team,
            *self._arguments(plan, out_TD),
            *(plan.scratch.order, weights_TK.data_ptr(), choices, n_tokens * choices),
            *(buffers.data_ptr(), 4 * buffers.stride(0)),
        )
        return out_TD

    def _pairs(self, plan: _Plan, token_P: Tensor) -> Tensor:
        """The rows of all pairs, sorted: by the kernel, but many float32 rows of an expert by BLAS."""
        y_PD = torch.empty(plan.n_pairs, self.hidden_size)
        team = native.team(self.expert_bytes)
        panels = native.panels(team, max(self.hidden_size, self.ffn_size)) if plan.most_rows > FEW_ROWS else None
        native.experts_pairs(team, *self._arguments(plan, y_PD), *native.where(panels))
        if plan.most_rows > self._most_rows:
            starts = plan.starts_E.tolist()
            for expert, (w13_2FD, w2_DF) in self._weights.items():
                begin, end = starts[expert], starts[expert + 1]
                if end - begin > self._most_rows:
                    both_P2F = F.linear(plan.x_TD[token_P[begin:end]], w13_2FD)
                    hidden_PF = plan.hidden_PF[begin:end]
                    native.silu_mul(
                        native.team(both_P2F.nbytes),
                        *(both_P2F.data_ptr(), hidden_PF.data_ptr(), end - begin, self.ffn_size),
                    )
                    torch.mm(hidden_PF, w2_DF.t(), out=y_PD[begin:end])
        return y_PD


class _Scratch:
    """Addresses of the plan's arrays, all in one tensor of int64."""

    def __init__(self, n_pairs: int, n_experts: int) -> None:
        self.values = torch.empty(2 + n_experts + 1 + 3 * n_pairs, dtype=torch.int64)
        self.first_order = 2 + n_experts + 1
        self.result = self.values.data_ptr()
        self.starts = self.result + 8 * 2
        self.order = self.result + 8 * self.first_order
        self.token_rows = self.order + 8 * n_pairs
        self.hidden_rows = self.token_rows + 8 * n_pairs


@dataclass(slots=True)
class _Plan:
    """The pairs of one call, sorted by expert."""

    x_TD: Tensor
    n_pairs: int
    hidden_PF: Tensor
    scratch: _Scratch
    most_rows: int = 0

    @property
    def starts_E(self) -> Tensor:
        return self.scratch.values[2 : self.scratch.first_order]

    @property
    def order_P(self) -> Tensor:
        return self.scratch.values[self.scratch.first_order : self.scratch.first_order + self.n_pairs]


def combine(y_PD: Tensor, token_P: Tensor, weight_P: Tensor, n_tokens: int) -> Tensor:
    """Weighted sum of each token's rows in float32, in the order of the pairs (ascending by expert).

    y_PD any dtype; token_P int32 or int64; weight_P float32. Returns float32 [T, D].
    """
    if not is_fast(y_PD):
        return reference.combine(y_PD, token_P, weight_P, n_tokens)
    y_PD, token_P, weight_P = y_PD.contiguous(), token_P.to(torch.int64).contiguous(), weight_P.contiguous()
    out_TD = torch.zeros(n_tokens, y_PD.shape[1])
    team = native.team(y_PD.nbytes)
    native.combine(
        team,
        *(y_PD.data_ptr(), y_PD.shape[1], len(token_P), token_P.data_ptr(), weight_P.data_ptr(), out_TD.data_ptr()),
    )
    return out_TD
