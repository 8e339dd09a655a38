"""ExpertShard against the reference in float64, and its slots: wrong rows, wrong counters, memory that stays."""

from __future__ import annotations

import gc
import threading

import psutil
import pytest
import torch

from workers.checkpoint import ExpertWeights
from workers.errors import ExpertNotHeld
from workers.kernels import select
from workers.kernels.torch.ops import TorchOps
from workers.shard import ExpertShard
from workers.spec import ModelSpec
from workers.weights import FORMATS, format_of, kept_in


def spec(hidden: int = 37, ffn: int = 53, experts: int = 5, layers: int = 2) -> ModelSpec:
    return ModelSpec(
        hidden_size=hidden, n_layers=layers, n_heads=1, n_kv_heads=1, head_dim=2, ffn_size=ffn, n_experts=experts,
        top_k=2, vocab_size=8, rope_theta=1e4, norm_eps=1e-5, sliding_window=None, tie_embeddings=False,
        max_context=64, bos_id=None, eos_ids=(), dtype=torch.float32,
    )  # fmt: skip


def weights(model: ModelSpec) -> ExpertWeights:
    d, f = model.hidden_size, model.ffn_size
    return ExpertWeights(w1_FD=torch.randn(f, d) / d**0.5, w2_DF=torch.randn(d, f) / f**0.5, w3_FD=torch.randn(f, d))


def full_shard(model: ModelSpec, dtype: torch.dtype = torch.float32) -> tuple[ExpertShard, list[ExpertWeights]]:
    torch.manual_seed(0)
    shard, experts = ExpertShard(model, "cpu", dtype), [weights(model) for _ in range(model.n_experts)]
    for expert, w in enumerate(experts):
        shard.load(1, expert, w)
    return shard, experts


def exact(experts: list[ExpertWeights], x_TD: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """y[t, k, D] in float64, unweighted."""
    ops = TorchOps(torch.device("cpu"), torch.float64)
    packed = [(ops.matrix(torch.cat((w.w1_FD, w.w3_FD))), ops.matrix(w.w2_DF)) for w in experts]
    return torch.stack(
        [
            torch.stack([ops.swiglu(x[None].double(), *packed[e])[0] for e in row])
            for x, row in zip(x_TD, ids_TK, strict=True)
        ]
    )


def summed(y_PD: torch.Tensor, ids_TK: torch.Tensor, order_P: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The rows of pairs in the order `order_P`, weighted and added one by one in the order of experts."""
    place_TK = order_P.argsort().view(ids_TK.shape)
    y_TD = torch.zeros(len(ids_TK), y_PD.shape[1])
    for token, row in enumerate(ids_TK):
        for k in row.argsort().tolist():
            y_TD[token] += weights_TK[token, k] * y_PD[place_TK[token, k]]
    return y_TD


def choices(tokens: int, experts: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("hidden", "ffn", "experts", "tokens", "k"),
    [
        (37, 53, 5, 1, 2),
        (37, 53, 5, 7, 3),
        (64, 130, 8, 16, 2),
        (16, 33, 3, 90, 2),
        (33, 16, 2, 33, 1),
        (9, 5, 4, 60, 4),
    ],
)
def test_equals_the_reference(hidden: int, ffn: int, experts: int, tokens: int, k: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shard, held = full_shard(spec(hidden, ffn, experts))
        x_TD, ids_TK = torch.randn(tokens, 2 * hidden)[:, ::2], choices(tokens, experts, k)
        weights_TK = torch.rand(tokens, k)
        y_TKD = exact(held, x_TD, ids_TK)

        y_TD = shard.combine(shard.dispatch(1, x_TD, ids_TK, weights_TK))
        torch.testing.assert_close(y_TD.double(), (weights_TK[..., None] * y_TKD).sum(1), rtol=1e-5, atol=1e-5)

        order_P = ids_TK.flatten().argsort(stable=True)
        token_P, expert_P = (order_P // k).int(), ids_TK.flatten()[order_P].int()
        y_PD = shard.forward(1, x_TD, token_P, expert_P)
        torch.testing.assert_close(y_PD.double(), y_TKD.flatten(0, 1)[order_P], rtol=1e-5, atol=1e-5)
        # What a router makes of the rows of its workers is, bit for bit, what one process computes.
        assert torch.equal(summed(y_PD, ids_TK, order_P, weights_TK), y_TD)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("hidden", "ffn", "tokens"),
    [(37, 53, 1), (37, 53, 7), (64, 130, 20), (37, 53, 90), (130, 67, 200), (1024, 64, 90), (64, 1024, 90)],
)
def test_experts_stored_in_16_bits_give_what_they_give_in_float32(
    hidden: int, ffn: int, tokens: int, dtype: torch.dtype
) -> None:
    model = spec(hidden, ffn)
    torch.manual_seed(0)
    stored = ExpertShard(model, dtype=torch.float32, weight_format=format_of(dtype))
    widened = ExpertShard(model, dtype=torch.float32)
    wide = [weights(model) for _ in range(model.n_experts)]
    held = [ExpertWeights(w.w1_FD.to(dtype), w.w2_DF.to(dtype), w.w3_FD.to(dtype)) for w in wide]
    for expert, w in enumerate(held):
        stored.load(1, expert, wide[expert] if expert % 2 else w)  # made so when they are loaded, or before
        widened.load(1, expert, w)
    assert stored.weight_bytes == widened.weight_bytes // 2

    x_TD, ids_TK, weights_TK = torch.randn(tokens, hidden), choices(tokens, model.n_experts, 2), torch.rand(tokens, 2)
    y_TD = stored.combine(stored.dispatch(1, x_TD, ids_TK, weights_TK))
    exact_TD = (weights_TK[..., None] * exact(held, x_TD, ids_TK)).sum(1)
    torch.testing.assert_close(y_TD.double(), exact_TD, rtol=1e-5, atol=3e-6 * hidden**0.5)  # w3 is not scaled
    # One order of summation, whatever the weights are stored as.
    assert torch.equal(y_TD, widened.combine(widened.dispatch(1, x_TD, ids_TK, weights_TK)))

    order_P = ids_TK.flatten().argsort(stable=True)
    y_PD = stored.forward(1, x_TD, (order_P // 2).int(), ids_TK.flatten()[order_P].int())
    assert torch.equal(summed(y_PD, ids_TK, order_P, weights_TK), y_TD)


def test_where_the_kernels_are_not_to_be_had_weights_are_widened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "usable", lambda: False)
    kept = kept_in(FORMATS["bfloat16"], select.formats_for("cpu", torch.float32), torch.float32)
    shard = ExpertShard(spec(), dtype=torch.float32, weight_format=kept)
    assert shard.format == FORMATS["float32"]
    shard.load(0, 1, weights(spec()))
    assert shard.dispatch(0, torch.randn(3, 37), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)).shape == (3, 37)


def test_all_rows_to_one_expert_and_no_rows() -> None:
    shard, held = full_shard(spec())
    for tokens in (0, 1, 20, 70):
        x_TD, expert_P = torch.randn(tokens, 37), torch.full((tokens,), 3)
        y_PD = shard.forward(1, x_TD, torch.arange(tokens), expert_P)
        assert y_PD.shape == (tokens, 37)
        if tokens:
            torch.testing.assert_close(y_PD.double(), exact(held, x_TD, expert_P[:, None])[:, 0], rtol=1e-5, atol=1e-5)
        assert shard.combine(shard.dispatch(1, x_TD, expert_P[:, None], torch.ones(tokens, 1))).shape == (tokens, 37)
    assert [slot.rows for slot in shard.slots] == [0, 0, 0, 2 * 91, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    shard, held = full_shard(spec(), dtype)
    x_TD, ids_TK, weights_TK = torch.randn(6, 37), choices(6, 5, 2), torch.rand(6, 2)
    y_TD = shard.combine(shard.dispatch(1, x_TD.to(dtype), ids_TK, weights_TK))
    assert y_TD.dtype == dtype
    expected_TD = (weights_TK[..., None] * exact(held, x_TD, ids_TK)).sum(1)
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_is_not_held_is_named(dtype: torch.dtype) -> None:
    shard, _ = full_shard(spec(), dtype)
    shard.unload(1, 2)
    x_TD = torch.randn(2, 37, dtype=dtype)
    with pytest.raises(ExpertNotHeld, match=r"layer 1.*expert 2"):
        shard.forward(1, x_TD, torch.tensor([0, 1]), torch.tensor([1, 2]))
    with pytest.raises(ExpertNotHeld, match=r"layer 0.*expert 0, 4"):
        shard.dispatch(0, x_TD, torch.tensor([[0], [4]]), torch.ones(2, 1))
    with pytest.raises(ExpertNotHeld):
        shard.unload(1, 2)


def test_slots_and_bytes() -> None:
    shard, _ = full_shard(spec())
    one = 3 * 37 * 53 * 4
    assert shard.weight_bytes == 5 * one
    shard.load(0, 4, weights(spec()))
    shard.unload(1, 0)
    assert [(slot.layer, slot.expert) for slot in shard.slots] == [(0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert shard.weight_bytes == 5 * one == sum(slot.weight_bytes for slot in shard.slots)


def test_unload_gives_the_memory_back() -> None:
    model = spec(hidden=512, ffn=1024, experts=4)
    shard, _ = full_shard(model)
    del _
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    for expert in range(4):
        shard.unload(1, expert)
    assert before - process.memory_info().rss > 3.5 * 3 * 512 * 1024 * 4


def test_loads_and_unloads_beside_forwards() -> None:
    """A forward beside a load or an unload gives the right rows or says that the expert is not held: nothing else."""
    shard, held = full_shard(spec())
    x_TD, token_P, expert_P = torch.randn(4, 37), torch.arange(4), torch.tensor([0, 1, 1, 3])
    right_PD = shard.forward(1, x_TD, token_P, expert_P)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            shard.unload(1, 1)
            shard.load(1, 1, held[1])
            stop.wait(0.001)

    thread = threading.Thread(target=churn)
    thread.start()
    right = 0
    try:
        while right < 100:
            try:
                assert torch.equal(shard.forward(1, x_TD, token_P, expert_P), right_PD)
                right += 1
            except ExpertNotHeld:
                pass
    finally:
        stop.set()
        thread.join()
