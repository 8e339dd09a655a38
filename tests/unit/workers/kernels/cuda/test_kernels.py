"""Every GPU kernel against plain arithmetic in float32, over random shapes and masks: on a GPU where there is one, else
in Triton's interpreter, in float16 (which gets bfloat16 products wrong).

Sizes are no powers of two, experts are missing, rows are padding: what a mask that is off by one would show.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from tests.interpreter import quick_interpreter
from workers.gate_spec import GateSpec
from workers.kernels.cuda import attention, rows, sampling
from workers.kernels.cuda.experts import E4M3, Slots, compute, quantized_rows
from workers.kernels.cuda.linear import linear
from workers.kernels.cuda.tiles import ExpertPlan, LinearPlan, Tile
from workers.kernels.ops import Unsummed
from workers.weights import FORMATS

__all__ = ["quick_interpreter"]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16
SHAPES = range(30)


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 3e-3) -> None:
    """Relative to the norm of all."""
    error = (got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-6)
    assert error < tolerance, f"relative error {error:.2e}"


def tile(draw: random.Random, bns: tuple[int, ...], bks: tuple[int, ...]) -> Tile:
    return Tile(draw.choice(bns), draw.choice(bks), 4, 2, draw.random() < 0.5, draw.random() < 0.5, draw.choice((0, 2)))


@pytest.mark.parametrize("seed", SHAPES)
def test_linear(seed: int) -> None:
    draw = random.Random(seed)
    t, n, k = draw.randint(1, 70), 8 * draw.randint(1, 20), 8 * draw.randint(2, 20)
    x, w = normal(seed, t, k), normal(seed + 1, n, k, scale=k**-0.5)
    bias = normal(seed + 2, n, dtype=torch.float32) if draw.random() < 0.5 else None
    plan = LinearPlan(draw.choice((16, 32, 128)), tile(draw, (16, 64), (16, 64)))
    want = x.float() @ w.float().T + (0 if bias is None else bias)
    close(linear(x, w, bias, torch.float32, plan), want)


def random_slots(draw: random.Random, seed: int, d: int, f: int) -> Slots:
    """Some of the experts, in any slots, with a slot that is free."""
    n_experts = draw.choice((3, 8, 20, 256))
    held = draw.sample(range(n_experts), draw.randint(1, min(5, n_experts)))
    n_slots = len(held) + 1
    slot_E = torch.full((n_experts,), -1, dtype=torch.int32)
    slot_E[held] = torch.tensor(draw.sample(range(n_slots), len(held)), dtype=torch.int32)
    return Slots(
        normal(seed + 1, n_slots, 2 * f, d, scale=d**-0.5), normal(seed + 2, n_slots, d, f, scale=f**-0.5),
        slot_E.to(DEVICE), torch.zeros(n_experts, dtype=torch.int64, device=DEVICE),
    )  # fmt: skip


def random_ids(draw: random.Random, slots: Slots, t: int) -> Tensor:
    """Different experts a row, some rows padding, and held ones more often than others."""
    n_experts = len(slots.slot_E)
    held = (slots.slot_E >= 0).nonzero()[:, 0].tolist()
    k, ids = draw.randint(1, min(8, n_experts)), []
    for _ in range(t):
        some = draw.sample(held, min(len(held), draw.randint(0, k)))
        rest = [e for e in draw.sample(range(n_experts), min(n_experts, 2 * k)) if e not in some]
        chosen = (some + rest)[:k]
        draw.shuffle(chosen)
        ids.append([-1] * k if draw.random() < 0.1 else chosen + [-1] * (k - len(chosen)))
    return torch.tensor(ids, dtype=torch.int32, device=DEVICE)


def expected_rows(x: Tensor, ids: Tensor, slots: Slots) -> Tensor:
    """y [T, K, D] in float32; zeros where an expert is not held."""
    y = torch.zeros(*ids.shape, x.shape[1], device=DEVICE)
    for t, row in enumerate(ids.tolist()):
        for c, expert in enumerate(row):
            slot = int(slots.slot_E[expert]) if expert >= 0 else -1
            if slot < 0:
                continue
            w13, w2 = slots.w13[slot].float(), slots.w2[slot].float()
            if slots.s13 is not None and slots.s2 is not None:
                w13, w2 = w13 * slots.s13[slot][:, None], w2 * slots.s2[slot][:, None]
            gate, up = (w13 @ x[t].float()).chunk(2)
            y[t, c] = w2 @ (torch.nn.functional.silu(gate) * up)
    return y


def by_pair(y: Tensor, place: Tensor, ids: Tensor) -> Tensor:
    return torch.where((place >= 0)[:, None], y.float()[place.long().clamp_min(0)], 0.0).view(*ids.shape, -1)


@pytest.mark.parametrize("seed", SHAPES)
def test_experts(seed: int) -> None:
    draw = random.Random(seed)
    t, d, f = draw.choice((1, 3, 17, 40)), 8 * draw.randint(2, 12), 8 * draw.randint(2, 12)
    slots = random_slots(draw, seed, d, f)
    x, ids = normal(seed, t, d), random_ids(draw, slots, t)
    plan = ExpertPlan(draw.choice((16, 32, 128)), tile(draw, (16, 32), (16, 32)), tile(draw, (16, 32), (16, 32)))
    y, place = compute(x, ids, slots, plan=plan)
    want = expected_rows(x, ids, slots)
    close(by_pair(y, place, ids), want)
    assert ((place >= 0).view(ids.shape) == (want != 0).any(2)).all()
    assert slots.count_E.tolist() == torch.bincount(
        ids.flatten()[place >= 0].long(), minlength=len(slots.slot_E)
    ).tolist()  # fmt: skip
    weights = normal(seed + 3, *ids.shape, dtype=torch.float32)
    summed = rows.weighted_sum(Unsummed(y, place, weights), torch.float32)
    close(summed, (want * weights[..., None]).sum(1))


@pytest.mark.parametrize("bits8_rows", [False, True])
def test_experts_of_8_bits(bits8_rows: bool) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit products need compute capability 8.9")
    for seed in range(8):
        draw = random.Random(seed)
        t, d, f = draw.choice((1, 5, 20)), 16 * draw.randint(2, 6), 16 * draw.randint(2, 12)
        slots = random_slots(draw, seed, d, f)
        pairs = [[FORMATS["fp8"].make(w[s]) for s in range(len(w))] for w in (slots.w13, slots.w2)]
        w13, w2 = (torch.stack([each.values_ND for each in of]) for of in pairs)
        s13, s2 = (torch.stack([each.scale_N for each in of]) for of in pairs)
        slots = replace(slots, w13=w13, s13=s13, w2=w2, s2=s2, rows8=bits8_rows)
        x, ids = normal(seed, t, d), random_ids(draw, slots, t)
        given, scale = quantized_rows(x) if bits8_rows else (x, None)
        up = replace(ExpertPlan(16, Tile(128, 32, 4, 2), Tile(32, 64, 4, 2)), bm=draw.choice((16, 32)))
        y, place = compute(given, ids, slots, scale, up)
        seen = x if scale is None else given.float() * scale[:, None]
        close(by_pair(y, place, ids), expected_rows(seen, ids, slots), 0.1 if bits8_rows else 5e-3)
        assert given.dtype == (E4M3 if bits8_rows else DTYPE)


def expected_choice(logits: Tensor, choice: GateSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    score = torch.sigmoid(logits) if choice.score == "sigmoid" else torch.softmax(logits, -1)
    key = score if bias is None else score + bias
    ids = torch.sort(key, dim=-1, descending=True, stable=True).indices[:, : choice.top_k]
    weights = score.gather(1, ids)
    if choice.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * choice.scale


@pytest.mark.parametrize("seed", SHAPES)
def test_norms_and_gate(seed: int) -> None:
    draw = random.Random(seed)
    t, d, e = draw.randint(1, 9), draw.randint(3, 150), draw.choice((3, 8, 20, 256))
    score = draw.choice(("softmax", "sigmoid"))
    choice = GateSpec(draw.randint(1, min(e, 8)), score, draw.random() < 0.5, draw.choice((1.0, 2.5)))
    bias = normal(seed + 5, e, scale=0.1, dtype=torch.float32) if draw.random() < 0.5 else None
    residual, norm, gate = normal(seed, t, d), normal(seed + 1, d), normal(seed + 2, e, d, scale=d**-0.5)
    delta = normal(seed + 3, t, d) if draw.random() < 0.7 else None
    scale, live = draw.choice((1.0, 0.3)), draw.randint(1, t)
    live_1 = torch.tensor([live], dtype=torch.int32, device=DEVICE)
    total = residual if delta is None else (residual.float() + scale * delta.float()).to(DTYPE)
    want = torch.nn.functional.rms_norm(total.float(), (d,), norm.float(), 1e-5)
    asked = rows.add_norm(residual, delta, norm, 1e-5, scale, gate, choice, bias, live_1)
    close(asked.x_TD, want)
    assert torch.equal(residual, total)
    logits = asked.x_TD.float() @ gate.float().T
    ids, weights = expected_choice(logits, choice, bias)
    for got_ids, got_weights in (
        (asked.ids_TK, asked.weights_TK), rows.choose(logits, choice, bias, live_1),
    ):  # fmt: skip
        assert got_ids is not None and got_weights is not None
        assert torch.equal(got_ids[:live].long(), ids[:live])
        assert (got_ids[live:] == -1).all()
        torch.testing.assert_close(got_weights[:live], weights[:live], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", SHAPES)
def test_rotary_write(seed: int) -> None:
    draw = random.Random(seed)
    d, g = draw.choice((6, 64, 80, 96)), draw.randint(1, 3)
    t, h, r = draw.randint(1, 5), g * draw.randint(1, 4), 2 * draw.randint(1, d // 2)
    kind, z, c = draw.choice((0, 1, 2)), 4, 7
    qkv = normal(seed, t, (h + 2 * g) * d)
    angle = normal(seed + 1, t, r // 2, dtype=torch.float32).repeat(1, 2)
    k, v = (torch.full((c, z, g, d), 7.0, dtype=DTYPE, device=DEVICE) for _ in range(2))
    slots = torch.tensor(draw.sample(range(c * z), t))
    slots[draw.randrange(t)] = -1
    q_norm, k_norm = (None if not kind else normal(seed + i, d if kind == 1 else n * d) for i, n in ((3, h), (4, g)))
    q = rows.rotary_write(qkv, slots.to(DEVICE), angle.cos(), angle.sin(), k, v, q_norm, k_norm, 1e-5)
    q_want, k_want, v_want = qkv.float().view(t, -1, d).split((h, g, g), 1)

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        if kind == 1:
            return torch.nn.functional.rms_norm(x, (d,), weight.float(), 1e-5)
        return torch.nn.functional.rms_norm(x.flatten(1), (x[0].numel(),), weight.float(), 1e-5).view(x.shape)

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., :r].chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((x[..., :r] * cos + torch.cat((-b, a), -1) * sin, x[..., r:]), -1)

    close(q, turned(normed(q_want, q_norm)))
    wanted = {int(s): i for i, s in enumerate(slots) if s >= 0}
    for pool, want in ((k, turned(normed(k_want, k_norm))), (v, v_want)):
        flat = pool.view(-1, g, d)
        close(flat[list(wanted)], want[list(wanted.values())]) if wanted else None
        assert (flat[[s for s in range(c * z) if s not in wanted]] == 7).all(), "a row that is padding was written"


@pytest.mark.parametrize("seed", SHAPES)
def test_attention(seed: int) -> None:
    """Rows that decode and rows of prompts with a past, mixed; and the same bits one row at a time."""
    draw = random.Random(seed)
    d = draw.choice((64, 80, 96, 128, 256) if seed < 15 else (6, 16, 32))
    g, z = draw.randint(1, 2), draw.choice((4, 16))
    h, window = g * draw.choice((1, 2, 3, 4)), draw.choice((None, 3, 100, 300))
    n_S = [draw.choice((1, 1, 2, 5, 40)) for _ in range(draw.randint(1, 3))]
    if seed % 5 == 0:
        n_S = [1] * len(n_S)
    past_S = [draw.choice((0, 3, 70, 255, 256, 520)) for _ in n_S]
    n_blocks = [-(-(n + p) // z) for n, p in zip(n_S, past_S, strict=True)]
    order = draw.sample(range(sum(n_blocks)), sum(n_blocks))
    table = torch.full((len(n_S), max(n_blocks)), 10**6, dtype=torch.int32)  # what lies beyond must not be looked at
    for s, n in enumerate(n_blocks):
        table[s, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
    k, v = (normal(seed + i, sum(n_blocks), z, g, d) for i in (1, 2))
    q = normal(seed, sum(n_S), h, d)
    sequence = torch.tensor([s for s, n in enumerate(n_S) for _ in range(n)])
    position = torch.tensor([p + i for n, p in zip(n_S, past_S, strict=True) for i in range(n)])
    starts = (0, *torch.tensor(n_S).cumsum(0).tolist())

    def run(q: Tensor, sequence: Tensor, position: Tensor, starts: tuple[int, ...]) -> Tensor:
        tile_rows = attention.tile_rows(h, g, d)
        who = attention.who(sequence.to(DEVICE), position.to(DEVICE), table.to(DEVICE), starts, tile_rows, z)
        return attention.attend(q, k, v, who, attention.make_items(who, h, d, window), d**-0.5, window)

    out = run(q, sequence, position, starts)
    want = torch.zeros(q.shape, device=DEVICE)
    for t, (s, p) in enumerate(zip(sequence.tolist(), position.tolist(), strict=True)):
        first = 0 if window is None else max(0, p + 1 - window)
        blocks = table[s, : p // z + 1].long().to(DEVICE)
        keys, values = (x[blocks].reshape(-1, g, d)[first : p + 1].repeat_interleave(h // g, 1).float() for x in (k, v))
        scores = torch.einsum("hd,jhd->hj", q[t].float(), keys) * d**-0.5
        want[t] = torch.einsum("hj,jhd->hd", scores.softmax(-1), values)
    close(out, want)
    for t in draw.sample(range(len(q)), min(4, len(q))):
        alone = run(q[t : t + 1], sequence[t : t + 1], position[t : t + 1], (0, 1))
        assert torch.equal(alone[0], out[t]), f"row {t} differs when it decodes alone"


@pytest.mark.parametrize("seed", range(6))
def test_padding_rows_attend_to_nothing(seed: int) -> None:
    """A step for 4 rows with 1 to 3 real ones: the rest has position -1."""
    live, h, g, d, z = 1 + seed % 3, 4, 2, 16, 4
    k, v, q = normal(1, 300, z, g, d), normal(2, 300, z, g, d), normal(seed, 4, h, d)
    position = torch.tensor([600 + 7 * i if i < live else -1 for i in range(4)])
    table = torch.arange(4 * 160, dtype=torch.int32).view(4, 160) % 300
    who = attention.who(torch.arange(4).to(DEVICE), position.to(DEVICE), table.to(DEVICE), (0, 1, 2, 3, 4), 8, z)
    out = attention.attend(q, k, v, who, attention.make_items(who, h, d, None), 0.25, None)
    few = attention.who(torch.arange(live).to(DEVICE), position[:live].to(DEVICE), table.to(DEVICE),
                        tuple(range(live + 1)), 8, z)  # fmt: skip
    alone = attention.attend(q[:live], k, v, few, attention.make_items(few, h, d, None), 0.25, None)
    assert torch.equal(out[:live], alone)


def draws(n: int, seed: int, **how: Any) -> sampling.Draws:
    def of(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.full((n,), value, dtype=dtype, device=DEVICE)

    index = torch.arange(n, device=DEVICE)
    return sampling.Draws(
        index, index, of(how.get("temperature", 1.0), torch.float64), of(how.get("top_k", 0), torch.int64),
        of(how.get("top_p", 1.0), torch.float64), of(how.get("min_p", 0.0), torch.float64), of(seed, torch.int64),
        torch.arange(n, device=DEVICE) + 2**33,
    )  # fmt: skip


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = normal(0, 4, 97, dtype=torch.float32)
    logits[1, 5], logits[2, 96], logits[3, 0] = float("nan"), float("inf"), float("-inf")
    last = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for temperature in (0.0, 1.0):
        tokens = sampling.draw(logits, draws(4, 1, temperature=temperature), last).tolist()
        assert tokens[1:3] == [-1, -1] and tokens[0] >= 0 and tokens[3] >= 0
