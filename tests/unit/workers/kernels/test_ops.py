"""The compiled operations against plain torch in float64, and against themselves with other neighbours, bit by bit:
wrong sums at odd sizes, strides, empty inputs, block borders; a row that depends on what is computed with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from workers.gate_spec import GateSpec
from workers.kernels.cpu.library import usable
from workers.kernels.cpu.ops import CpuOps
from workers.kernels.ops import AttentionMetadata, Ops, QKNorm
from workers.kernels.torch.ops import TorchOps
from workers.weights import Matrix, format_of

pytestmark = pytest.mark.skipif(not usable(), reason="the CPU kernels cannot be built here")

SIZES = [(1, 1), (3, 2), (37, 301), (64, 130), (515, 66), (512, 256)]
CPU, EXACT = CpuOps(), TorchOps(torch.device("cpu"), torch.float64)


@pytest.fixture(autouse=True, params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def close(fast: Tensor, exact: Tensor) -> None:
    assert fast.dtype == torch.float32 and fast.is_contiguous()
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_inputs", "n_outputs"), SIZES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 13, 32, 33, 131])
def test_linear(n_inputs: int, n_outputs: int, rows: int) -> None:
    weight_ND, x_TD = torch.randn(n_outputs, n_inputs) / n_inputs**0.5, torch.randn(rows, n_inputs)
    bias_N = torch.randn(n_outputs) if rows % 2 else None
    close(CPU.linear(x_TD, CPU.matrix(weight_ND, bias_N)), EXACT.linear(x_TD.double(), EXACT.matrix(weight_ND, bias_N)))


def test_linear_takes_views() -> None:
    weight_ND = torch.randn(40, 24)
    for x_TD in (
        torch.randn(24, 5).T,
        torch.randn(5, 50)[:, 7:31],
        torch.randn(10, 24)[::2],
        torch.randn(1, 24).expand(5, 24),
    ):
        close(CPU.linear(x_TD, CPU.matrix(weight_ND)), x_TD.double() @ weight_ND.double().T)


@pytest.mark.parametrize("n_inputs", [30, 512])
def test_a_row_does_not_depend_on_its_neighbours(n_inputs: int) -> None:
    """Tiles, blocks of rows, threads: none of them may change the order of a sum."""
    weight, x_TD = CPU.matrix(torch.randn(70, n_inputs)), torch.randn(450, n_inputs)
    together_TN = CPU.linear(x_TD, weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 64, 199):
        assert torch.equal(torch.cat([CPU.linear(part, weight) for part in x_TD.split(rows)]), together_TN)
    torch.set_num_threads(3 - torch.get_num_threads())
    assert torch.equal(CPU.linear(x_TD, weight), together_TN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [*SIZES, (31, 33), (300, 97), (1024, 40)])
@pytest.mark.parametrize("rows", [0, 1, 2, 6, 13, 33, 70, 131])
def test_stored_in_16_bits_equals_the_same_weights_in_float32(
    rows: int, n_inputs: int, n_outputs: int, dtype: torch.dtype
) -> None:
    weight_ND, x_TD = (torch.randn(n_outputs, n_inputs) / n_inputs**0.5).to(dtype), torch.randn(rows, n_inputs + 3)
    x_TD = x_TD[:, :n_inputs]
    weight = CPU.matrix(weight_ND)
    assert weight.values_ND.dtype == dtype
    y_TN = CPU.linear(x_TD, weight)
    close(y_TN, x_TD.double() @ weight_ND.double().T)
    assert torch.equal(y_TN, CPU.linear(x_TD, CPU.matrix(weight_ND.float())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_torch_in_half_precision(dtype: torch.dtype) -> None:
    ops = TorchOps(torch.device("cpu"), dtype)
    weight_ND, x_TD = torch.randn(40, 24, dtype=dtype), torch.randn(3, 24, dtype=dtype)
    y_TN = ops.linear(x_TD, ops.matrix(weight_ND))
    assert y_TN.dtype == dtype
    torch.testing.assert_close(y_TN.double(), x_TD.double() @ weight_ND.double().T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("rows", "hidden"), [(0, 8), (1, 512), (7, 37), (150, 513)])
def test_norms(rows: int, hidden: int) -> None:
    residual_TD, delta_TD, weight_D = (
        torch.randn(rows, 2 * hidden)[:, ::2],
        torch.randn(rows, hidden),
        torch.randn(hidden),
    )
    close(CPU.rms_norm(residual_TD, weight_D, 1e-5), EXACT.rms_norm(residual_TD.double(), weight_D.double(), 1e-5))
    wide_TD = torch.randn(rows, hidden + 3)[:, 1:-2]
    for kept_TD, scale in ((residual_TD.contiguous(), 1.0), (wide_TD, 0.22)):
        before_TD = kept_TD.clone()
        y_TD = CPU.add_rms_norm(kept_TD, delta_TD, weight_D, 1e-5, scale)
        torch.testing.assert_close(kept_TD, before_TD + scale * delta_TD, rtol=1e-6, atol=1e-6)
        close(y_TD, EXACT.rms_norm(kept_TD.double(), weight_D.double(), 1e-5))
        CPU.add(before_TD, delta_TD, scale)
        assert torch.equal(before_TD, kept_TD)


@pytest.mark.parametrize(
    "spec",
    [GateSpec(3), GateSpec(2, normalize=False), GateSpec(4, "sigmoid", scale=2.5), GateSpec(1, "sigmoid", False)],
    ids=["mixtral", "not_normalised", "sigmoid", "sigmoid_of_one"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_gate(spec: GateSpec, biased: bool) -> None:
    logits_TE = torch.randn(60, 20)[:, 1:18]
    bias_E = torch.randn(17) / 4 if biased else None
    ids_TK, weights_TK = CPU.gate(logits_TE, spec, bias_E)
    exact_ids_TK, exact_TK = EXACT.gate(logits_TE.double(), spec, bias_E)
    assert torch.equal(ids_TK, exact_ids_TK) and ids_TK.dtype == torch.int64
    torch.testing.assert_close(weights_TK.double(), exact_TK.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([CPU.gate(row, spec, bias_E)[1] for row in logits_TE.split(7)]), weights_TK)
    assert CPU.gate(logits_TE[:0], spec, bias_E)[0].shape == (0, spec.top_k)


def test_gate_prefers_the_lower_expert_of_equals() -> None:
    logits_TE = torch.zeros(2, 8)
    logits_TE[1, 2:5] = 9.0
    for ops in (CPU, EXACT):
        ids_TK, weights_TK = ops.gate(logits_TE, GateSpec(3))
        assert ids_TK.tolist() == [[0, 1, 2], [2, 3, 4]]
        torch.testing.assert_close(weights_TK, torch.full((2, 3), 1 / 3, dtype=weights_TK.dtype))


def attended(
    ops: Ops, qkv_TX: Tensor, metadata: AttentionMetadata, angles_Tr: Tensor, keys: Tensor, values: Tensor,
    norm: QKNorm | None, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    q_THd = ops.rotary_write(qkv_TX, metadata, angles_Tr.cos(), angles_Tr.sin(), keys, values, norm)
    return ops.attention(q_THd, keys, values, metadata, scale, window)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "rotated", "block", "window", "norm"),
    [
        (8, 2, 64, 64, 16, None, ""),
        (6, 3, 10, 4, 4, None, "head"),
        (4, 4, 66, 66, 5, 7, "row"),
        (9, 3, 64, 32, 16, 100, "head"),
        (2, 1, 2, 2, 1, 1, ""),
    ],
)
def test_attention_over_blocks(
    heads: int, kv_heads: int, head: int, rotated: int, block: int, window: int | None, norm: str
) -> None:
    """A prompt in one piece, in pieces, token by token, and in other blocks: right, and the same bits; norms, partial
    rotation."""
    n_blocks, length = 12, 5 * block + 3
    table_SB = torch.randperm(40)[: 3 * n_blocks].view(3, n_blocks).int()
    size_X, scale = (heads + 2 * kv_heads) * head, 0.7 * head**-0.5
    qkv_TX, angles_Tr = torch.randn(length, 2 * size_X)[:, :size_X], torch.rand(length, rotated // 2).repeat(1, 2) * 6
    sizes = {"": None, "head": (head, head), "row": (heads * head, kv_heads * head)}[norm]
    weights = None if sizes is None else QKNorm(1 + torch.rand(sizes[0]), 1 + torch.rand(sizes[1]), 1e-5)
    pools = [torch.full((40, block, kv_heads, head), float("nan")) for _ in range(4)]

    def metadata(parts: list[tuple[int, int, int]], block: int = block) -> AttentionMetadata:
        """Of (sequence, first position, end)."""
        position_T = torch.cat([torch.arange(first, end) for _, first, end in parts])
        sequence_T = torch.cat([torch.full((end - first,), i) for i, (_, first, end) in enumerate(parts)])
        blocks_SB = table_SB[[sequence for sequence, _, _ in parts]]
        slot_T = blocks_SB[sequence_T, position_T // block].long() * block + position_T % block
        q_start = (0, *itertools.accumulate(end - first for _, first, end in parts))
        return AttentionMetadata(blocks_SB, sequence_T, position_T, slot_T, q_start)

    whole = metadata([(0, 0, length)])
    y_THd = attended(CPU, qkv_TX, whole, angles_Tr, *pools[:2], weights, window, scale)
    exact = [pool.double() for pool in pools[2:]]
    exact_norm = None if weights is None else QKNorm(weights[0].double(), weights[1].double(), weights[2])
    close(y_THd, attended(EXACT, qkv_TX.double(), whole, angles_Tr.double(), *exact, exact_norm, window, scale))

    cuts = [*range(0, length, max(1, length // 4)), length]
    for first, end in itertools.pairwise(cuts):  # sequence 2 token by token, sequence 1 in pieces beside it
        for position in range(first, end):
            rows, pieces = torch.tensor([position]), [(2, position, position + 1)]
            if position == first:
                rows, pieces = torch.cat((rows, torch.arange(first, end))), [*pieces, (1, first, end)]
            part = attended(CPU, qkv_TX[rows], metadata(pieces), angles_Tr[rows], *pools[2:], weights, window, scale)
            assert torch.equal(part, y_THd[rows])

    others = [torch.full((40, 7, kv_heads, head), float("nan")) for _ in range(2)]
    in_other_blocks = metadata([(0, 0, length)], 7)
    assert torch.equal(y_THd, attended(CPU, qkv_TX, in_other_blocks, angles_Tr, *others, weights, window, scale))


@pytest.mark.parametrize("gated", [False, True])
def test_swiglu(gated: bool) -> None:
    w13, w2, gate = torch.randn(2 * 53, 37) / 6, torch.randn(37, 53) / 7, torch.randn(1, 37) / 6 if gated else None
    for rows in (0, 1, 7, 90):
        x_TD = torch.randn(rows, 37)
        y_TD = CPU.swiglu(x_TD, CPU.matrix(w13), CPU.matrix(w2), None if gate is None else CPU.matrix(gate))
        exact = [None if w is None else Matrix(w.double()) for w in (w13, w2, gate)]
        assert exact[0] is not None and exact[1] is not None
        close(y_TD, EXACT.swiglu(x_TD.double(), exact[0], exact[1], exact[2]))


def test_a_graph_repeats_its_calls_on_new_contents() -> None:
    """Counters that are not reset, a missing barrier between two calls, memory that is freed under the graph."""
    first, second, norm_D = CPU.matrix(torch.randn(700, 300)), CPU.matrix(torch.randn(90, 700)), torch.randn(90)
    x_TD = torch.empty(4, 300)

    def steps(ops: Ops) -> Tensor:
        return ops.rms_norm(ops.linear(ops.linear(x_TD, first), second), norm_D, 1e-5)

    graph, y_TN = CPU.capture(steps)
    for _ in range(50):
        x_TD.normal_()
        graph.replay()
        assert torch.equal(y_TN, steps(CPU))


def test_a_graph_says_when_an_expert_has_gone() -> None:
    [layer] = CPU.layer_experts(1, 3, 16, 8, format_of(torch.float32))
    for expert in range(3):
        layer.put(expert, Matrix(torch.randn(16, 16)), Matrix(torch.randn(16, 8)))
    x_TD, ids_TK, weights_TK = torch.randn(2, 16), torch.tensor([[0, 2], [2, 1]]), torch.rand(2, 2)
    graph, y_TD = CPU.capture(lambda ops: ops.experts_combined(layer, x_TD, ids_TK, weights_TK))
    graph.replay()
    assert torch.equal(y_TD, CPU.experts_combined(layer, x_TD, ids_TK, weights_TK))
    layer.drop(1)
    with pytest.raises(KeyError):
        graph.replay()
    ids_TK[1, 1] = 0
    graph.replay()
    assert torch.equal(y_TD, CPU.experts_combined(layer, x_TD, ids_TK, weights_TK))
