"""The sampler on the device draws what the one on the host draws: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from cluster.router.compute import Draw, Drawn
from cluster.router.device_sampler import DeviceSampler
from cluster.router.logprobs import token_logprobs
from cluster.router.params import SamplingParams
from cluster.router.sampler import Sampler
from cluster.router.sequence import Sequence
from tests.interpreter import quick_interpreter

__all__ = ["quick_interpreter"]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 120
FILTERED = 0.4 if DEVICE == "cuda" else 0.025  # of the draws by top-k and by top-p: 30 times as slow there


def parameters(draw: random.Random, index: int) -> SamplingParams:
    """Every stage on and off, in all combinations."""
    options: dict[str, Any] = {"temperature": draw.choice((0.0, 0.3, 1.0, 1.7))}
    if draw.random() < FILTERED:
        options["top_k"] = draw.choice((1, 5, 40, VOCAB + 3))
    if draw.random() < FILTERED:
        options["top_p"] = draw.choice((0.1, 0.5, 0.9, 0.999))
    if draw.random() < 0.3:
        options["min_p"] = draw.choice((0.01, 0.2))
    if draw.random() < 0.3:
        options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2}
    if draw.random() < 0.3:
        options["logit_bias"] = {draw.randrange(VOCAB): draw.choice((-100.0, 2.5)) for _ in range(5)}
    if draw.random() < 0.2:
        options["allowed_ids"] = tuple(draw.sample(range(VOCAB), 9))
    if draw.random() < 0.2:
        options["bad_words"] = tuple((token,) for token in draw.sample(range(VOCAB), 40))
    if draw.random() < 0.2:
        options |= {"min_tokens": 50, "stop_ids": (3, 4, 5)}
    return SamplingParams(max_tokens=64, seed=draw.getrandbits(64), logprobs=draw.choice((None, 0, 4)), **options)


def sequences(n: int, seed: int) -> list[Sequence]:
    draw = random.Random(seed)
    made = []
    for i in range(n):
        prompt, emitted = ([draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))] for _ in range(2))
        made.append(Sequence(str(i), prompt, parameters(draw, i), eos_ids=(2,), emitted_ids=emitted))
    return made


def on_device(sampler: DeviceSampler, logits: torch.Tensor, rows: list[Sequence]) -> list[Drawn]:
    return sampler.start(logits.to(DEVICE), [Draw(i, sequence) for i, sequence in enumerate(rows)]).result()


@pytest.mark.parametrize("seed", range(20))
def test_draws_are_those_of_the_host(seed: int) -> None:
    """Ten thousand in all."""
    n = 500
    logits = torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, :20] = logits[:, :20].round()  # ties
    rows = sequences(n, seed)
    kept = logits.clone()
    drawn = on_device(DeviceSampler(VOCAB, torch.zeros(n, dtype=torch.int32, device=DEVICE)), logits, rows)
    assert torch.equal(logits, kept), "the logits were written to"
    assert [each.token for each in drawn] == Sampler(VOCAB).sample(logits.numpy(), rows)
    for each, sequence, logits_V in zip(drawn, rows, logits.numpy(), strict=True):
        n_top = sequence.params.logprobs
        assert (each.logprobs is None) == (n_top is None)
        if each.logprobs is not None and n_top is not None and isinstance(each.token, int):
            want = token_logprobs(logits_V, each.token, n_top)
            assert [token for token, _ in each.logprobs.top] == [token for token, _ in want.top]
            np.testing.assert_allclose(each.logprobs.logprob, want.logprob, atol=1e-5)


def test_the_token_stays_on_the_device_for_the_next_step() -> None:
    last = torch.full((5,), -7, dtype=torch.int32, device=DEVICE)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    drawn = on_device(DeviceSampler(VOCAB, last), logits, sequences(3, 1))
    assert last.tolist() == [each.token for each in drawn] + [-7, -7]


def test_a_row_without_finite_logits_ends_alone() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[1, 7] = float("nan")
    device = DeviceSampler(VOCAB, torch.zeros(3, dtype=torch.int32, device=DEVICE))
    rows = [Sequence(str(i), [1], SamplingParams(max_tokens=4, temperature=t)) for i, t in enumerate((1.0, 1.0, 0.0))]
    first, second, third = on_device(device, logits, rows)
    assert isinstance(first.token, int) and isinstance(third.token, int)
    assert "not finite" in str(second.token)
