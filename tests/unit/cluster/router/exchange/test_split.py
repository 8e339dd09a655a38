"""Cutting a dispatch by worker and adding it up again, against a plain loop; compiled, and where nothing can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.exchange.split import split
from workers import wire
from workers.kernels.ops import Ops
from workers.kernels.select import ops_for
from workers.kernels.torch.ops import TorchOps
from workers.wire import Tag

OPS = [ops_for("cpu", torch.float32), TorchOps(torch.device("cpu"), torch.float32)]
assert OPS[0].exact_rows
with_every = pytest.mark.parametrize("ops", OPS, ids=["compiled", "plain"])


def new_tag() -> Tag:
    return Tag(1, 2, 3, 4, 5, 6)


@with_every
@given(st.integers(1, 50), st.integers(1, 4), st.integers(4, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_every_pair_goes_to_its_owner_once_and_finds_its_place(
    ops: Ops, t: int, k: int, e: int, w: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(t, 3 + seed % 2, generator=draw)[:, :3]
    ids_TK = torch.rand(t, e, generator=draw).argsort(dim=1)[:, :k]
    weights_TK = torch.rand(t, k, generator=draw)
    owner_E = np.random.default_rng(seed).integers(0, w, e)
    rows_E = np.ones(e, np.int64)
    split_W, plan = split(ops, x_TD, ids_TK, weights_TK, owner_E, w, rows_E, new_tag)
    parts = list(split_W)

    assert rows_E.tolist() == (1 + torch.bincount(ids_TK.flatten(), minlength=e)).tolist()

    replies = []
    for worker, rows in parts:
        sent_TD, token_P, expert_P = rows.request
        assert rows.n_pairs == len(token_P)
        if rows.message is not None:
            assert bytes(rows.message) == b"".join(next(wire.request_frames(new_tag(), sent_TD, token_P, expert_P)))
        assert rows.n_bytes == sent_TD.nbytes + token_P.nbytes + expert_P.nbytes
        assert (owner_E[expert_P.numpy()] == worker).all()
        assert (expert_P.diff() >= 0).all()
        assert len(token_P.unique()) == len(sent_TD), "a row is sent that no pair needs, or sent twice"
        replies.append((expert_P + 1)[:, None] * sent_TD[token_P.long()])  # expert e multiplies by e + 1
    assert [worker for worker, _ in parts] == sorted({int(owner) for owner in owner_E[ids_TK.numpy()].ravel()})
    y_TD = ops.weighted_sum(replies, plan)

    expected_TD = torch.zeros(t, 3)
    for token in range(t):
        for choice in ids_TK[token].argsort():
            expected_TD[token] += weights_TK[token, choice] * ((ids_TK[token, choice] + 1) * x_TD[token])
    assert torch.equal(y_TD, expected_TD), "not added in expert order"


@with_every
def test_one_expert_a_token(ops: Ops) -> None:
    weights_T1 = torch.tensor([[0.5], [1.0], [3.0]])
    for ids in ([0, 0, 1], [1, 0, 0]):
        rows_PD, counter_E = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.zeros(2, np.int64)
        _, plan = split(ops, rows_PD, torch.tensor(ids)[:, None], weights_T1, np.array([0, 1]), 2, counter_E, new_tag)
        expected_TD = weights_T1 * rows_PD[plan.place_TK[:, 0]]
        assert torch.equal(ops.weighted_sum((rows_PD,), plan), expected_TD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_added_in_float32(dtype: torch.dtype) -> None:
    ids_TK, weights_TK, rows_PD = torch.tensor([[2, 0]]), torch.tensor([[0.25, 0.75]]), torch.randn(2, 5).to(dtype)
    ops = TorchOps(torch.device("cpu"), dtype)
    _, plan = split(ops, rows_PD[:1], ids_TK, weights_TK, np.zeros(3, np.int64), 1, np.zeros(3, np.int64), new_tag)
    y_TD = ops.weighted_sum((rows_PD,), plan)
    assert torch.equal(y_TD, (0.75 * rows_PD[:1].float() + 0.25 * rows_PD[1:].float()).to(dtype))
