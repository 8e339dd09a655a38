"""On a GPU a request gives the same bits alone and in a crowd, as a prompt and token by token, before and after a move,
and the same tokens whether they are drawn on the device, a step ahead, or on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

from cluster.bench.gpu.random_model import MIXTRAL_8X7B, RandomModel  # noqa: E402
from cluster.config import Config  # noqa: E402
from cluster.router.compute import Compute, HostCompute  # noqa: E402
from cluster.router.engine import Engine  # noqa: E402
from cluster.router.params import SamplingParams  # noqa: E402
from workers.model.batch import Batch  # noqa: E402
from workers.weights import FORMATS, Matrix, WeightFormat  # noqa: E402

SPEC = replace(
    MIXTRAL_8X7B, n_layers=2, hidden_size=1024, ffn_size=1536, n_heads=16, n_kv_heads=4, head_dim=64, vocab_size=1000
)
Z, LENGTH = 16, 300
SIZES = (1, 2, 16, 64, 256)
Job = tuple[list[int], SamplingParams]


def made(weight_format: WeightFormat | None = None) -> RandomModel:
    return RandomModel(SPEC, 256 * 20 + 40, Z, weight_format)


def prompt_batch(tokens: list[int], table: torch.Tensor) -> Batch:
    n = len(tokens)
    position = torch.arange(n)
    return Batch(torch.tensor(tokens), position, table[0, position // Z].long() * Z + position % Z, (0, n),
                 torch.tensor([n], dtype=torch.int32), table, torch.arange(n))  # fmt: skip


def decode_batch(tokens: list[int], tables: torch.Tensor) -> Batch:
    """The last of `tokens` as one row, among rows of other sequences that are as long."""
    n, position = len(tables), len(tokens) - 1
    others = torch.randint(SPEC.vocab_size, (n,), generator=torch.Generator().manual_seed(n))
    others[0] = tokens[-1]
    slots, context = (
        tables[:, position // Z].long() * Z + position % Z,
        torch.full((n,), position + 1, dtype=torch.int32),
    )
    return Batch(others, torch.full((n,), position), slots, tuple(range(n + 1)), context, tables, torch.arange(n))


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "fp8-rows"])
def test_the_same_bits_in_every_batch(kind: str) -> None:
    from workers.model.decode_graphs import DecodeGraphs

    if kind != "bfloat16" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit products need compute capability 8.9")
    model = made(FORMATS[kind])
    graphs = DecodeGraphs(model.decoder, 256, 1024)
    graphs.capture(256)
    tokens = torch.randint(SPEC.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    blocks = -(-LENGTH // Z)
    tables = torch.randperm(256 * blocks, generator=torch.Generator().manual_seed(2)).view(256, blocks).int()
    prompt_NV = model.decoder.forward([prompt_batch(tokens, tables[:1])]).clone()
    chunks = torch.cat([  # in pieces, the later ones over a past
        model.decoder.forward([part]).clone() for part in prompt_batch(tokens, tables[:1]).split(3)
    ])  # fmt: skip
    assert torch.equal(chunks, prompt_NV), "a prompt in chunks differs"
    for size in SIZES:
        logits_TV = graphs.run(decode_batch(tokens, tables[:size]), list(range(size)))
        assert torch.equal(logits_TV[0], prompt_NV[-1]), f"decoding among {size} differs from the prompt"
    before = graphs.run(decode_batch(tokens, tables[:16]), list(range(16))).clone()
    for layer in range(SPEC.n_layers):  # every expert to another slot, under the captured graphs
        kept = {expert: (copy(w13), copy(w2)) for expert, (w13, w2) in model.shard.weights(layer).items()}
        for expert in kept:
            model.shard.unload(layer, expert)
        for expert in reversed(kept):
            model.shard._layers[layer].put(expert, *kept[expert])
    after = graphs.run(decode_batch(tokens, tables[:16]), list(range(16)))
    assert torch.equal(before, after), "a move changed the bits"


def copy(matrix: Matrix) -> Matrix:
    return Matrix(matrix.values_ND.clone(), None if matrix.scale_N is None else matrix.scale_N.clone())


def run(model: RandomModel, compute: Compute, jobs: list[Job]) -> dict[str, list[int]]:
    engine = Engine(model.decoder, Config(max_sequences=64, max_batch_tokens=512, prefix_cache=False), compute=compute)
    for index, (ids, params) in enumerate(jobs):
        engine.submit(str(index), ids, params)
    given: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output.error
            given.setdefault(output.request_id, []).extend(output.token_ids)
    return given


def test_the_same_tokens_drawn_on_the_device_a_step_ahead() -> None:
    from cluster.router.device_compute import DeviceCompute

    model = made()
    draw = torch.Generator().manual_seed(0)
    options = [{"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 40},
               {"min_p": 0.05, "logprobs": 3}, {"frequency_penalty": 0.5, "repetition_penalty": 1.1},
               {"logit_bias": {5: 3.0}, "min_tokens": 5},
               {"prompt_logprobs": 1}, {"allowed_ids": (7, 8, 9)}]  # fmt: skip
    jobs: list[Job] = []
    for i in range(36):
        ids = torch.randint(SPEC.vocab_size, ((3, 40, 300, 700)[i % 4],), generator=draw).tolist()
        jobs.append((ids, SamplingParams(max_tokens=20 + i % 7, seed=i, **options[i % 9])))  # type: ignore[arg-type]
    device = DeviceCompute(model.decoder, 64, 1024, 512)
    together = run(model, device, jobs)
    assert together == run(model, HostCompute(model.decoder), jobs)
    for i in (0, 1, 2, 5, 17):
        assert run(model, device, [jobs[i]])["0"] == together[str(i)], f"request {i} differs when it is alone"
