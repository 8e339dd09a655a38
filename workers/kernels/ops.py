"""The operations that a device implements for a model: every one of them, with its shapes.

Legend: T token rows, D hidden size or inputs, N outputs, F ffn, E experts, K choices a token, P (token, expert) pairs,
H query heads, G key/value heads, d head size, r rotated part of a head, X = (H + 2G) * d, C cache blocks of Z rows,
S sequences, B blocks a sequence. "Rows" are of the dtype and on the device of the `Ops`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from workers.gate_spec import GateSpec
from workers.kernels.dispatch import Ints, Plan
from workers.kernels.experts import LayerExperts
from workers.kernels.mutex import Mutex
from workers.weights import Matrix, WeightFormat

Result = TypeVar("Result")


class QKNorm(NamedTuple):
    """RMSNorm of queries and keys before they are rotated. A weight of length d is for each head on its own; one of
    length H * d (keys: G * d) for the whole row."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Whose the T rows of a micro-batch are, and where keys and values lie. Tensors are on the device.

    Row t is at `position_T[t]` of sequence `sequence_T[t]`; its key and value go to cache row `slot_T[t]` = block *
    block size + offset. Key j of sequence s lies in block `block_table_SB[s, j // Z]` at offset `j % Z`. The rows of
    sequence s are `q_start[s]:q_start[s + 1]`, never none, at ascending positions.
    """

    block_table_SB: Tensor  # int32
    sequence_T: Tensor  # int64
    position_T: Tensor  # int64
    slot_T: Tensor  # int64
    q_start: tuple[int, ...]  # on the host


class Unsummed(NamedTuple):
    """The rows of a layer's experts that are not added up yet: the norm that follows does it on its way.

    A token's sum is that of `weights_TK * rows_PD[place_TK]`, in float32, in ascending order of place: expert order.
    """

    rows_PD: Tensor
    place_TK: Tensor  # int32; -1: nothing
    weights_TK: Tensor  # float32


Delta = Tensor | Unsummed  #: What is added to the residual stream.


def summed(delta: Delta) -> Tensor:
    """The delta, of operations that never leave rows unsummed."""
    assert isinstance(delta, Tensor), "rows that are not added up are for the operations that made them"
    return delta


def unsummed(delta: Delta) -> Unsummed:
    """The rows, of operations that leave them unsummed."""
    assert isinstance(delta, Unsummed), "these operations add up what experts gave"
    return delta


class Graph(Protocol):
    """Calls that were captured."""

    def replay(self) -> None:
        """Everything captured once more, in order, on the same memory. Raises KeyError(*experts) as `experts` does."""


class Rings(NamedTuple):
    """Two rings of shared memory (`transport.shm.ring`) by their addresses, and the bytes of each."""

    requests: int
    replies: int
    n_bytes: int


class RingLoop(Protocol):
    """Answers what comes in a ring, by itself."""

    def run(self, received: int, freed: int) -> tuple[int, int]:
        """Answer requests until one comes that Python has to look at, which is left where it is, or until `close`.

        Given and returned: how many requests were taken in, and how many replies nobody reads any more, as int32.
        """

    def close(self) -> None:
        """Let `run` return as soon as it looks up. From any thread."""


class Answers(Protocol):
    """Answers whole requests of few rows, without Python between their bytes and the experts."""

    def answer(self, message: memoryview) -> memoryview | None:
        """The reply to a whole REQUEST of `workers.wire`; None where it has to be parsed and given to `experts`: for
        many rows, for experts that are not held and for whatever is wrong."""

    def loop(self, rings: Rings, threads: int, cores: int, locks: tuple[Mutex, Mutex], counts: array[int]) -> RingLoop:
        """What answers requests that come in a ring into another one.

        threads: that it may compute on; cores: that those share who are asked at once. locks: of the batcher and of the
        shard; held while it computes. counts: pairs, nanoseconds, and calls of at most 1, 2, 4, ... pairs; added to
        while it has the locks.
        """


class Ops(Protocol):
    """A device's kernels. Results are new tensors, contiguous, which the caller owns, but for what is said to be done
    in place. Rows may be views; a row's result does not depend on the rows beside it where `exact_rows` says so."""

    device: torch.device
    dtype: torch.dtype  # of rows, cache and norms
    capture_rows: int  # steps of up to so many rows gain by capturing each layer; 0: none does
    exact_rows: bool  # whether every sum runs in one order, whatever else is computed with it

    def matrix(self, weight_ND: Tensor, bias_N: Tensor | None = None) -> Matrix:
        """Weights ready for `linear`: on the device and in the layout its products want. Once, when they are loaded."""

    def linear(self, x_TD: Tensor, weight: Matrix) -> Tensor:
        """`x @ weight.T`, with its scale and bias. [T, N]."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """`x / rms(x) * weight`, the mean square in float32. [T, D]."""

    def add_rms_norm(
        self, residual_TD: Tensor, delta: Delta, weight_D: Tensor, eps: float, scale: float = 1.0
    ) -> Tensor:
        """`residual += scale * delta` in place, then the norm of it. [T, D]."""

    def add_norm_gate(
        self,
        residual_TD: Tensor,
        delta: Delta,
        weight_D: Tensor,
        eps: float,
        gate: Matrix,
        spec: GateSpec,
        bias_E: Tensor | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`add_rms_norm`, and what `gate` makes of its product with the gate: x [T, D], ids and weights [T, K]."""

    def add(self, residual_TD: Tensor, delta: Delta, scale: float = 1.0) -> None:
        """`residual += scale * delta` in place."""

    def rotary_write(
        self,
        qkv_TX: Tensor,
        metadata: AttentionMetadata,
        cos_Tr: Tensor,
        sin_Tr: Tensor,
        k_cache_CZGd: Tensor,
        v_cache_CZGd: Tensor,
        norm: QKNorm | None = None,
    ) -> Tensor:
        """Normalise and rotate q and k, write k and v to their cache rows. Returns q [T, H, d].

        Rotary embedding by halves of the first r entries of a head: `x * cos + (-x2, x1) * sin`; the rest stays. cos
        and sin are float32, by row; their second half repeats the first.
        """

    def attention(
        self,
        q_THd: Tensor,
        k_cache_CZGd: Tensor,
        v_cache_CZGd: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention over paged keys and values, of prompts and of decoding sequences alike. [T, H, d].

        A row sees the keys up to its own position, of which the last `window` when there is one.
        """

    def gate(self, logits_TE: Tensor, spec: GateSpec, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts of each token, best first, and their weights: int64 [T, K], float32 [T, K].

        bias_E, float32, is added to the scores for the choice alone.
        """

    def swiglu(self, x_TD: Tensor, w13: Matrix, w2: Matrix, gate: Matrix | None = None) -> Tensor:
        """`w2 (silu(w1 x) * (w3 x))`, times `sigmoid(gate x)` where there is a gate (of one output). w13 is w1 over
        w3. For what all rows go through: dense layers, shared experts. [T, D]."""

    def layer_experts(
        self, n_layers: int, n_experts: int, hidden_size: int, ffn_size: int, weight_format: WeightFormat
    ) -> list[LayerExperts]:
        """Room for the experts of so many layers, none held; where it is taken beforehand they share it."""

    def rows_LE(self, layers: Sequence[LayerExperts]) -> Tensor:
        """int64 [L, E] on the host, of all layers that were made together: the rows that each expert computed since its
        weights came. From any thread; waits for nothing that is computed."""

    def experts(
        self,
        layer: LayerExperts,
        x_TD: Tensor,
        token_P: Tensor,
        expert_P: Tensor,
        out_PD: Tensor | None = None,
    ) -> Tensor:
        """`y[p] = expert(expert_P[p])(x[token_P[p]])`, unweighted, and counts the rows. [P, D]: `out_PD` if given.

        token_P and expert_P are int32 or int64; expert_P ascends. Raises KeyError(*experts) for those not held.
        """

    def experts_combined(self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Delta:
        """The weighted sum over each token's experts, all of this layer, added in expert order in float32. [T, D].

        Raises KeyError as `experts` does, where it does not only launch.
        """

    def dispatch_plan(self, ids_TK: Tensor, weights_TK: Tensor, owner_E: Ints, n_workers: int, counter_E: Ints) -> Plan:
        """Sort the pairs of a dispatch by (worker, expert, token). `owner_E[e]` is the worker of expert e.

        ids_TK: int64, distinct within a row. counter_E: the pairs of each expert are added to it.
        """

    def pack_request(self, plan: Plan, x_TD: Tensor, rows: slice, pairs: slice, message: memoryview) -> None:
        """Lay out one worker's request in `message`, in host memory, behind the header: the rows `plan.row_P[rows]` of
        x, then token_P and expert_P of `pairs`."""

    def weighted_sum(self, parts: Sequence[Tensor], plan: Plan) -> Tensor:
        """`y[t] = sum over k of weights[t, k] * rows[place[t, k]]`, added in the order of k in float32. [T, D].

        The rows are those of all parts, one after the other: [P_w, D] each, contiguous.
        """

    def answers(self, layers: Sequence[LayerExperts]) -> Answers | None:
        """How requests are answered without Python, with the experts of `layers`; None: not on this device."""

    def capture(self, function: Callable[[Ops], Result]) -> tuple[Graph, Result]:
        """Call `function` once with the operations whose calls are captured; what it returns lies where every
        `Graph.replay` writes. Nothing in it may read what a kernel writes. Only where there are `capture_rows`."""
