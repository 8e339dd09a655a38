"""The operations by the compiled kernels: float32 rows in host memory.

Legend: that of `workers.kernels.ops`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.gate_spec import GateSpec
from workers.kernels.cpu import arguments, kernel
from workers.kernels.cpu.answer import CpuAnswers
from workers.kernels.cpu.experts import expert_arguments, n_places
from workers.kernels.cpu.graph import CpuGraph
from workers.kernels.cpu.kernel import Kernel, Values
from workers.kernels.dispatch import Ints, Plan, address
from workers.kernels.experts import LayerExperts
from workers.kernels.memory import use_huge_pages
from workers.kernels.message import HEADER_BYTES
from workers.kernels.ops import Answers, AttentionMetadata, Delta, Graph, Ops, QKNorm, Result, summed
from workers.weights import Matrix, WeightFormat

#: Queries that attention takes the keys of a prompt for at a time.
QUERIES = 24


class CpuOps:
    """`Ops` of a CPU. Weights of 16 bits stay so: they are made float32, which is exact, while they are read."""

    device = torch.device("cpu")
    dtype = torch.float32
    capture_rows = 32
    exact_rows = True

    def matrix(self, weight_ND: Tensor, bias_N: Tensor | None = None) -> Matrix:
        if weight_ND.dtype not in kernel.kinds():
            weight_ND = weight_ND.float()
        weight_ND = weight_ND.detach().contiguous()
        use_huge_pages(weight_ND)
        return Matrix(weight_ND, None, None if bias_N is None else bias_N.float().contiguous())

    def linear(self, x_TD: Tensor, weight: Matrix, *, gated: bool = False) -> Tensor:
        x_TD = _with_unit_stride(x_TD)
        n_rows, (n, k) = len(x_TD), weight.values_ND.shape
        y_TN = self.empty(n_rows, n)
        team = kernel.team(weight.nbytes)
        rows = self.empty(team, n_rows, dtype=torch.int64)
        values = arguments.Linear(
            x=x_TD.data_ptr(), x_stride=4 * x_TD.stride(0), weight=weight.values_ND.data_ptr(), gated=gated,
            bias=0 if weight.bias_N is None else weight.bias_N.data_ptr(), y=y_TN.data_ptr(), n_rows=n_rows, k=k,
            n=n, kind=kernel.kinds()[weight.values_ND.dtype], rows=rows.data_ptr(),
        )  # fmt: skip
        self.run(kernel.linear, team, values)
        return y_TN

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = _with_unit_stride(x_TD)
        y_TD = self.empty(*x_TD.shape)
        self._norm(x_TD, None, weight_D, y_TD, eps, 1.0)
        return y_TD

    def add_rms_norm(
        self, residual_TD: Tensor, delta: Delta, weight_D: Tensor, eps: float, scale: float = 1.0
    ) -> Tensor:
        y_TD = self.empty(*residual_TD.shape)
        self._norm(residual_TD, _with_unit_stride(summed(delta)), weight_D, y_TD, eps, scale)
        return y_TD

    def add_norm_gate(
        self, residual_TD: Tensor, delta: Delta, weight_D: Tensor, eps: float, gate: Matrix, spec: GateSpec,
        bias_E: Tensor | None = None, scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x_TD = self.add_rms_norm(residual_TD, delta, weight_D, eps, scale)
        return x_TD, *self.gate(self.linear(x_TD, gate), spec, bias_E)

    def add(self, residual_TD: Tensor, delta: Delta, scale: float = 1.0) -> None:
        self._norm(residual_TD, _with_unit_stride(summed(delta)), None, None, 0.0, scale)

    def _norm(
        self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor | None, y_TD: Tensor | None, eps: float,
        scale: float,
    ) -> None:  # fmt: skip
        assert x_TD.stride(1) == 1 or x_TD.numel() == 0, "rows are changed in place"
        values = arguments.Norm(
            x=x_TD.data_ptr(), x_stride=4 * x_TD.stride(0), delta=_address(delta_TD),
            delta_stride=0 if delta_TD is None else 4 * delta_TD.stride(0), weight=_address(weight_D),
            y=_address(y_TD), n_rows=len(x_TD), d=x_TD.shape[1], eps=eps, scale=scale,
        )  # fmt: skip
        self.run(kernel.norm, kernel.team(4 * x_TD.numel()), values)

    def rotary_write(
        self, qkv_TX: Tensor, metadata: AttentionMetadata, cos_Tr: Tensor, sin_Tr: Tensor, k_cache_CZGd: Tensor,
        v_cache_CZGd: Tensor, norm: QKNorm | None = None,
    ) -> Tensor:  # fmt: skip
        n_rows, (n_kv, head) = len(qkv_TX), k_cache_CZGd.shape[-2:]
        n_heads = qkv_TX.shape[1] // head - 2 * n_kv
        q_THd = self.empty(n_rows, n_heads, head)
        values = arguments.RotaryWrite(
            qkv=qkv_TX.data_ptr(), qkv_stride=4 * qkv_TX.stride(0), q=q_THd.data_ptr(), n_rows=n_rows,
            n_heads=n_heads, n_kv=n_kv, head=head, rotated=cos_Tr.shape[1], slot=metadata.slot_T.data_ptr(),
            cos=cos_Tr.data_ptr(), sin=sin_Tr.data_ptr(), keys=k_cache_CZGd.data_ptr(),
            values=v_cache_CZGd.data_ptr(), q_norm=0 if norm is None else norm.q_weight.data_ptr(),
            k_norm=0 if norm is None else norm.k_weight.data_ptr(),
            q_norm_size=0 if norm is None else len(norm.q_weight),
            k_norm_size=0 if norm is None else len(norm.k_weight), eps=0.0 if norm is None else norm.eps,
        )  # fmt: skip
        self.run(kernel.rotary_write, kernel.team(4 * qkv_TX.numel()), values)
        return q_THd

    def attention(
        self, q_THd: Tensor, k_cache_CZGd: Tensor, v_cache_CZGd: Tensor, metadata: AttentionMetadata, scale: float,
        window: int | None = None,
    ) -> Tensor:  # fmt: skip
        n_rows, n_heads, head = q_THd.shape
        size, n_kv = k_cache_CZGd.shape[1:3]
        group, most_keys = n_heads // n_kv, metadata.block_table_SB.shape[1] * size
        out_THd = self.empty(n_rows, n_heads, head)
        team = kernel.team(4 * n_rows * most_keys * n_kv * head)
        n_sequences = len(metadata.q_start) - 1
        rows = 1 if n_rows == n_sequences else max(1, QUERIES // group)
        scratch = self.empty(team, rows * group * (4 + most_keys))
        values = arguments.Attention(
            q=q_THd.data_ptr(), out=out_THd.data_ptr(), n_rows=n_rows, rows=rows, n_heads=n_heads,
            n_kv=n_kv, head=head, keys=k_cache_CZGd.data_ptr(), values=v_cache_CZGd.data_ptr(), block_size=size,
            tables=metadata.block_table_SB.data_ptr(), table_stride=4 * metadata.block_table_SB.stride(0),
            sequence=metadata.sequence_T.data_ptr(), position=metadata.position_T.data_ptr(),
            window=window or most_keys, scratch=scratch.data_ptr(), scratch_stride=4 * scratch.stride(0),
            score_stride=4 * most_keys, scale=scale,
        )  # fmt: skip
        self.run(kernel.attention, team, values)
        return out_THd

    def gate(self, logits_TE: Tensor, spec: GateSpec, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = _with_unit_stride(logits_TE)
        n_rows, n_experts = logits_TE.shape
        ids_TK, weights_TK = self.empty(n_rows, spec.top_k, dtype=torch.int64), self.empty(n_rows, spec.top_k)
        scores_E = self.empty(n_experts)
        values = arguments.Gate(
            logits=logits_TE.data_ptr(), logits_stride=4 * logits_TE.stride(0), bias=_address(bias_E),
            ids=ids_TK.data_ptr(), weights=weights_TK.data_ptr(), n_rows=n_rows, n_experts=n_experts, k=spec.top_k,
            sigmoid=spec.score == "sigmoid", normalize=spec.normalize, scores=scores_E.data_ptr(), scale=spec.scale,
        )  # fmt: skip
        self.run(kernel.gate, 1, values)
        return ids_TK, weights_TK

    def swiglu(self, x_TD: Tensor, w13: Matrix, w2: Matrix, gate: Matrix | None = None) -> Tensor:
        hidden_T2F = self.linear(x_TD, w13, gated=True)
        y_TD = self.linear(hidden_T2F[:, : w2.values_ND.shape[1]], w2)
        if gate is not None:
            logits_T1 = self.linear(x_TD, gate)
            values = arguments.GateRows(
                y=y_TD.data_ptr(), logits=logits_T1.data_ptr(), n_rows=len(y_TD), d=y_TD.shape[1]
            )
            self.run(kernel.gate_rows, kernel.team(y_TD.nbytes), values)
        return y_TD

    def layer_experts(
        self, n_layers: int, n_experts: int, hidden_size: int, ffn_size: int, weight_format: WeightFormat
    ) -> list[LayerExperts]:
        return [LayerExperts(n_experts, hidden_size, ffn_size, weight_format) for _ in range(n_layers)]

    def rows_LE(self, layers: Sequence[LayerExperts]) -> Tensor:
        return torch.stack([layer.rows_E for layer in layers])

    def experts(
        self,
        layer: LayerExperts,
        x_TD: Tensor,
        token_P: Tensor,
        expert_P: Tensor,
        out_PD: Tensor | None = None,
    ) -> Tensor:
        x_TD, token_P, expert_P = _with_unit_stride(x_TD), token_P.int().contiguous(), expert_P.int().contiguous()
        missing_1 = torch.zeros(1, dtype=torch.int64)
        pairs = token_P.data_ptr(), expert_P.data_ptr()
        y_PD = self.empty(len(token_P), layer.hidden_size) if out_PD is None else out_PD
        self._experts(layer, x_TD, pairs, y_PD, missing_1)
        if missing_1[0]:
            raise KeyError(*layer.missing(expert_P))
        return y_PD

    def experts_combined(self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        missing_1 = torch.zeros(1, dtype=torch.int64)
        y_TD = self._experts_combined(layer, x_TD, ids_TK, weights_TK, missing_1)
        if missing_1[0]:
            raise KeyError(*layer.missing(ids_TK))
        return y_TD

    def _experts_combined(
        self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, missing_1: Tensor
    ) -> Tensor:
        x_TD, ids_TK, weights_TK = _with_unit_stride(x_TD), ids_TK.contiguous(), weights_TK.contiguous()
        plan = Plan(len(ids_TK), ids_TK.shape[1], layer.n_experts, 1)
        self._plan(plan, ids_TK, weights_TK, 0, 0)
        y_PD = self.empty(plan.n_pairs, layer.hidden_size)
        self._experts(layer, x_TD, plan.pairs_address, y_PD, missing_1)
        return self.weighted_sum((y_PD,), plan)

    def _experts(
        self, layer: LayerExperts, x_TD: Tensor, pairs: tuple[int, int], y_PD: Tensor, missing_1: Tensor
    ) -> None:
        """`pairs`: addresses of token_P and expert_P, int32."""
        n_pairs = len(y_PD)
        hidden_P2F = self.empty(n_pairs, 2 * layer.ffn_size)
        places = self.empty(n_places(layer.n_experts, n_pairs), dtype=torch.int64)
        in_order, products = expert_arguments(layer, hidden_P2F, places, n_pairs)
        in_order = in_order._replace(
            token=pairs[0], expert=pairs[1], n_pairs=n_pairs, x=x_TD.data_ptr(), x_stride=4 * x_TD.stride(0),
            missing=missing_1.data_ptr(),
        )  # fmt: skip
        self.run(kernel.pairs, 1, in_order)
        self.run(kernel.experts, kernel.team(layer.expert_bytes), products._replace(y=y_PD.data_ptr()))

    def dispatch_plan(self, ids_TK: Tensor, weights_TK: Tensor, owner_E: Ints, n_workers: int, counter_E: Ints) -> Plan:
        plan = Plan(len(ids_TK), ids_TK.shape[1], len(owner_E), n_workers)
        ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
        self._plan(plan, ids_TK, weights_TK, address(owner_E), address(counter_E))
        return plan

    def _plan(self, plan: Plan, ids_TK: Tensor, weights_TK: Tensor, owner: int, counter: int) -> None:
        self.hold(plan)
        values = arguments.Plan(
            ids=ids_TK.data_ptr(),
            weights=weights_TK.data_ptr(),
            owner=owner,
            counter=counter,
            n_tokens=plan.n_tokens,
            k=plan.n_choices,
            n_experts=plan.n_experts,
            n_workers=plan.n_workers,
            memory=plan.address,
        )
        self.run(kernel.plan, 1, values)

    def pack_request(self, plan: Plan, x_TD: Tensor, rows: slice, pairs: slice, message: memoryview) -> None:
        x_TD = _with_unit_stride(x_TD)
        token, expert = plan.pairs_address
        values = arguments.PackRequest(
            x=x_TD.data_ptr(),
            x_stride=4 * x_TD.stride(0),
            d=x_TD.shape[1],
            row=plan.row_address + 8 * rows.start,
            n_rows=rows.stop - rows.start,
            token=token + 4 * pairs.start,
            expert=expert + 4 * pairs.start,
            n_pairs=pairs.stop - pairs.start,
            out=address(message) + HEADER_BYTES,
        )
        self.run(kernel.pack_request, 1, values)

    def weighted_sum(self, parts: Sequence[Tensor], plan: Plan) -> Tensor:
        table, first = array("q"), 0
        for part in parts:
            table.extend((first, part.data_ptr()))
            first += len(part)
        self.hold(table)
        return self.sum_parts(table.buffer_info()[0], len(parts), plan, parts[0].shape[1])

    def sum_parts(self, table: int, n_parts: int, plan: Plan, d: int) -> Tensor:
        """`weighted_sum` of parts whose `table` for the kernel is there."""
        y_TD = self.empty(plan.n_tokens, d)
        values = arguments.WeightedSum(
            parts=table,
            n_parts=n_parts,
            place=plan.place_address,
            weights=plan.weights_address,
            out=y_TD.data_ptr(),
            n_tokens=plan.n_tokens,
            k=plan.n_choices,
            d=d,
        )
        self.run(kernel.weighted_sum, kernel.team(4 * plan.n_pairs * d), values)
        return y_TD

    def answers(self, layers: Sequence[LayerExperts]) -> Answers | None:
        return CpuAnswers(layers)

    def capture(self, function: Callable[[Ops], Result]) -> tuple[Graph, Result]:
        graph = CpuGraph()
        return graph, function(_Capturing(graph))

    def run(self, called: Kernel[Values], team: int, values: Values) -> None:
        """Call a kernel. This, `empty` and `hold` are what capturing does otherwise."""
        called(team, values)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that a kernel is given."""
        return torch.empty(shape, dtype=dtype)

    def hold(self, memory: object) -> None:
        """Memory that a kernel is given lies in this: nothing to do when it is called at once."""


class _Capturing(CpuOps):
    """Notes the calls instead, and keeps what they point into."""

    def __init__(self, graph: CpuGraph) -> None:
        self._graph = graph

    def experts_combined(self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self._experts_combined(layer, x_TD, ids_TK, weights_TK, self._graph.missing_1)

    def run(self, called: Kernel[Values], team: int, values: Values) -> None:
        self._graph.add(called, team, values)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        memory = super().empty(*shape, dtype=dtype)
        self.hold(memory)
        return memory

    def hold(self, memory: object) -> None:
        self._graph.hold(memory)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _with_unit_stride(x_TD: Tensor) -> Tensor:
    """`x`, copied if its rows are not contiguous in themselves."""
    return x_TD if x_TD.stride(-1) == 1 or x_TD.shape[-1] == 1 else x_TD.contiguous()
