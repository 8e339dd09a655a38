"""The fast kernels against the plain ones in float64: wrong sums at odd sizes, strides, empty inputs, block borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.kernels import reference
from workers.kernels.attention import paged_attention, rotary_write
from workers.kernels.experts import combine
from workers.kernels.gate import gate_top_k
from workers.kernels.linear import FEW_ROWS, PackedLinear, kept, product
from workers.kernels.native import Tape
from workers.kernels.norm import add_rms_norm, rms_norm

SIZES = [(1, 1), (3, 2), (37, 301), (64, 130), (515, 66), (512, 256)]


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
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 13, FEW_ROWS, FEW_ROWS + 1])
def test_linear(n_inputs: int, n_outputs: int, rows: int) -> None:
    weight_ND, x_TD = torch.randn(n_outputs, n_inputs) / n_inputs**0.5, torch.randn(rows, n_inputs)
    close(PackedLinear(weight_ND)(x_TD), x_TD.double() @ weight_ND.double().T)


def test_linear_takes_views() -> None:
    weight_ND = torch.randn(40, 24)
    linear = PackedLinear(weight_ND)
    for x_TD in (
        torch.randn(24, 5).T,
        torch.randn(5, 50)[:, 7:31],
        torch.randn(10, 24)[::2],
        torch.randn(1, 24).expand(5, 24),
    ):
        close(linear(x_TD), x_TD.double() @ weight_ND.double().T)


@pytest.mark.parametrize("n_inputs", [30, 512])
def test_a_row_does_not_depend_on_its_neighbours(n_inputs: int) -> None:
    linear, x_TD = PackedLinear(torch.randn(70, n_inputs)), torch.randn(FEW_ROWS, n_inputs)
    together_TN = linear(x_TD)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11):
        assert torch.equal(torch.cat([linear(part) for part in x_TD.split(rows)]), together_TN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [*SIZES, (31, 33), (300, 97), (1024, 40)])
@pytest.mark.parametrize("rows", [0, 1, 2, 6, 13, FEW_ROWS, FEW_ROWS + 1, 43, 70, 131])
def test_stored_in_16_bits_equals_the_same_weights_in_float32(
    rows: int, n_inputs: int, n_outputs: int, dtype: torch.dtype
) -> None:
    """To the last bit, for few rows and for many: panels that are turned wrongly, edges, tiles of every size."""
    weight_ND, x_TD = (torch.randn(n_outputs, n_inputs) / n_inputs**0.5).to(dtype), torch.randn(rows, n_inputs + 3)
    x_TD = x_TD[:, :n_inputs]
    y_TN = PackedLinear(weight_ND)(x_TD)
    close(y_TN, x_TD.double() @ weight_ND.double().T)
    if rows:
        assert torch.equal(y_TN, product(x_TD, weight_ND.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    """Subnormal numbers, zeros of both signs, the largest ones."""
    assert kept(torch.float32) == {torch.bfloat16, torch.float16} and not kept(torch.bfloat16)
    every_N = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite_N1 = every_N[every_N.isfinite()][:, None]
    for rows in (1, FEW_ROWS + 1):
        y_TN = PackedLinear(finite_N1)(torch.ones(rows, 1))
        assert torch.equal(y_TN, finite_N1.float().T.expand(rows, -1))


def test_many_rows_do_not_depend_on_their_neighbours() -> None:
    linear, x_TD = PackedLinear(torch.randn(70, 130).bfloat16()), torch.randn(210, 130)
    together_TN = linear(x_TD)
    for rows in (35, 70, 105):
        assert torch.equal(torch.cat([linear(part) for part in x_TD.split(rows)]), together_TN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_half_precision(dtype: torch.dtype) -> None:
    weight_ND, x_TD = torch.randn(40, 24, dtype=dtype), torch.randn(3, 24, dtype=dtype)
    y_TN = PackedLinear(weight_ND)(x_TD)
    assert y_TN.dtype == dtype
    torch.testing.assert_close(y_TN.double(), x_TD.double() @ weight_ND.double().T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("rows", "hidden"), [(0, 8), (1, 512), (7, 37), (150, 513)])
def test_norms(rows: int, hidden: int) -> None:
    residual_TD, delta_TD, weight_D = (
        torch.randn(rows, 2 * hidden)[:, ::2],
        torch.randn(rows, hidden),
        torch.randn(hidden),
    )
    close(rms_norm(residual_TD, weight_D, 1e-5), reference.rms_norm(residual_TD.double(), weight_D.double(), 1e-5))
    for kept_TD in (residual_TD.clone(), residual_TD.contiguous()):
        y_TD = add_rms_norm(kept_TD, delta_TD, weight_D, 1e-5)
        assert torch.equal(kept_TD, residual_TD + delta_TD)
        close(y_TD, reference.rms_norm(kept_TD.double(), weight_D.double(), 1e-5))


def test_gate_prefers_the_lower_expert_of_equals() -> None:
    logits_TE = torch.randn(60, 16)[:, 1:9]
    logits_TE[3] = 0.0
    logits_TE[4, 2:5] = 9.0
    ids_TK, weights_TK = gate_top_k(logits_TE, 3)
    exact_ids_TK, exact_TK = reference.gate_top_k(logits_TE, 3)
    assert torch.equal(ids_TK, exact_ids_TK) and ids_TK[3].tolist() == [0, 1, 2] and ids_TK[4].tolist() == [2, 3, 4]
    torch.testing.assert_close(weights_TK, exact_TK)
    assert gate_top_k(logits_TE[:0], 3)[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "block", "window"),
    [(8, 2, 64, 16, None), (6, 3, 10, 4, None), (4, 4, 66, 5, 7), (9, 3, 64, 16, 100), (2, 1, 2, 1, 1)],
)
def test_attention_over_blocks(heads: int, kv_heads: int, head: int, block: int, window: int | None) -> None:
    blocks = 12
    keys, values = torch.randn(40, block, kv_heads, head), torch.randn(40, block, kv_heads, head)
    keys64, values64 = keys.double(), values.double()
    table_SB = torch.randperm(40)[: 3 * blocks].view(3, blocks).int()
    sequence_T = torch.tensor([0, 1, 2, 2])
    position_T = torch.tensor([0, block * blocks - 1, 5 * block - 1, 5 * block])
    slot_T = table_SB[sequence_T, position_T // block].long() * block + position_T % block
    angles_Rd = torch.rand(block * blocks, head // 2).repeat(1, 2) * 6
    qkv_TX = torch.randn(4, 2 * (heads + 2 * kv_heads) * head)[:, : (heads + 2 * kv_heads) * head]

    q_THd = rotary_write(qkv_TX, position_T, slot_T, angles_Rd.cos(), angles_Rd.sin(), keys, values)
    exact_THd = reference.rotary_write(
        qkv_TX.double(), position_T, slot_T, angles_Rd.cos(), angles_Rd.sin(), keys64, values64
    )
    close(q_THd, exact_THd)
    close(keys, keys64)
    close(values, values64)

    y_THd = paged_attention(q_THd, keys, values, table_SB, sequence_T, position_T, head**-0.5, window)
    close(
        y_THd,
        reference.paged_attention(exact_THd, keys64, values64, table_SB, sequence_T, position_T, head**-0.5, window),
    )
    alone_THd = paged_attention(
        q_THd[2:3], keys, values, table_SB[:, :5], sequence_T[2:3], position_T[2:3], head**-0.5, window
    )
    assert torch.equal(alone_THd, y_THd[2:3])


def test_combine_adds_in_the_order_of_the_pairs() -> None:
    token_P, weight_P, y_PD = torch.randint(0, 9, (40,)), torch.rand(40), torch.randn(40, 70)
    out_TD = combine(y_PD, token_P.int(), weight_P, 10)
    assert torch.equal(out_TD, reference.combine(y_PD, token_P, weight_P, 10))
    one_by_one_D = torch.zeros(70)
    for pair in (token_P == 3).nonzero()[:, 0]:
        one_by_one_D += weight_P[pair] * y_PD[pair]
    assert torch.equal(out_TD[3], one_by_one_D) and not out_TD[9].any()
    assert combine(y_PD[:0], token_P[:0], weight_P[:0], 2).tolist() == [[0.0] * 70] * 2


def test_a_tape_repeats_its_calls_on_new_contents() -> None:
    """Counters that are not reset, a missing barrier between two calls, memory that is freed under the tape."""
    first, second, norm_D = PackedLinear(torch.randn(700, 300)), PackedLinear(torch.randn(90, 700)), torch.randn(90)
    x_TD = torch.empty(4, 300)
    with Tape() as tape:
        y_TN = rms_norm(second(first(x_TD)), norm_D, 1e-5)
    for _ in range(50):
        x_TD.normal_()
        tape.run()
        assert torch.equal(y_TN, rms_norm(second(first(x_TD)), norm_D, 1e-5))
