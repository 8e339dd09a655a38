"""Catches weights that move under a captured step, which has their address: an expert that comes must not change it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from workers.errors import DeviceError
from workers.kernels.cuda.ops import CudaOps
from workers.weights import Matrix, format_of

D, FFN, E = 16, 8, 4


def weights(seed: int) -> tuple[Matrix, Matrix]:
    torch.manual_seed(seed)
    return Matrix(torch.randn(2 * FFN, D).half()), Matrix(torch.randn(D, FFN).half())


def test_an_expert_of_any_layer_comes_to_a_free_slot_and_nothing_moves() -> None:
    first, second = CudaOps(torch.device("cpu"), torch.float16).layer_experts(2, E, D, FFN, format_of(torch.float16))
    first.reserve(5)
    for expert in range(E):
        first.put(expert, *weights(expert))
    address = first.slots.w13.data_ptr(), first.slots.w2.data_ptr()
    second.put(3, *weights(30))
    with pytest.raises(DeviceError, match="all 5 slots"):
        second.put(1, *weights(10))
    assert second.held == {3}, "an expert without a slot is named in the table"
    first.drop(2)
    second.put(1, *weights(10))
    assert (first.slots.w13.data_ptr(), first.slots.w2.data_ptr()) == address
    assert second.slots.w13.data_ptr() == address[0], "each layer has memory of its own"
    assert first.slots.slot_E.tolist() == [0, 1, -1, 3]
    assert second.slots.slot_E.tolist() == [-1, 2, -1, 4]
    for layer, expert, seed in ((first, 3, 3), (second, 3, 30), (second, 1, 10)):
        slot = int(layer.slots.slot_E[expert])
        w13, w2 = weights(seed)
        assert torch.equal(layer.slots.w13[slot], w13.values_ND)
        assert torch.equal(layer.weights[expert][1].values_ND, w2.values_ND)


def test_without_a_reservation_it_grows_and_keeps_what_it_has() -> None:
    [layer] = CudaOps(torch.device("cpu"), torch.float16).layer_experts(1, 40, D, FFN, format_of(torch.float16))
    for expert in range(40):
        layer.put(expert, *weights(expert))
    for expert in (0, 7, 8, 39):
        assert torch.equal(layer.weights[expert][0].values_ND, weights(expert)[0].values_ND)
        assert torch.equal(layer.slots.w13[int(layer.slots.slot_E[expert])], weights(expert)[0].values_ND)
