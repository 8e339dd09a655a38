"""Cutting a dispatch by worker and adding it up again, against a plain loop."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.split import split, weighted_sum


@settings(deadline=None)  # compiled at first use
@given(st.integers(1, 20), st.integers(1, 4), st.integers(4, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_every_pair_goes_to_its_owner_once_and_finds_its_place(t: int, k: int, e: int, w: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(t, 3, generator=draw)
    ids_TK = torch.rand(t, e, generator=draw).argsort(dim=1)[:, :k]
    weights_TK = torch.rand(t, k, generator=draw)
    owner_E = np.random.default_rng(seed).integers(0, w, e)
    rows_E = np.zeros(e, np.int64)
    pieces, place_TK, sorted_TK = split(x_TD, ids_TK.numpy(), weights_TK.numpy(), owner_E, w, rows_E)

    assert rows_E.tolist() == torch.bincount(ids_TK.flatten(), minlength=e).tolist()

    rows = []
    for piece in pieces:
        expert_P = piece.expert_P.long()
        assert (owner_E[expert_P.numpy()] == piece.worker).all()
        assert (expert_P.diff() >= 0).all()
        assert len(piece.token_P.unique()) == len(piece.x_TD), "a row is sent that no pair needs, or sent twice"
        rows.append((expert_P + 1)[:, None] * piece.x_TD[piece.token_P.long()])  # expert e multiplies by e + 1
    assert [piece.worker for piece in pieces] == sorted({int(owner) for owner in owner_E[ids_TK.numpy()].ravel()})
    y_TD = weighted_sum(torch.cat(rows), place_TK, sorted_TK)

    expected_TD = torch.zeros(t, 3)
    for token in range(t):
        for choice in ids_TK[token].argsort():
            expected_TD[token] += weights_TK[token, choice] * ((ids_TK[token, choice] + 1) * x_TD[token])
    assert torch.equal(y_TD, expected_TD), "not added in expert order"
