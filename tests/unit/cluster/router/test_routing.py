"""The experts that an answer's tokens went through, as requests may ask: those of transformers, whatever happened.

Catches: a layer, position or choice mixed up; experts of another sequence's rows; tokens told twice or not at all after
a preemption, a shared prefix, a continuation, a merge on a slow stream.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from cluster.config import Config
from cluster.gateway.journal import Entry
from cluster.router.codec import decode_output, decode_sampling, encode_submit, merge_output
from cluster.router.engine import Engine
from cluster.router.params import Routing, SamplingParams, StepOutput
from tests.reference import Paged, gate_margins, random_tokens, save_shape
from workers.pb import generation_pb2 as pb

N = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("routing")
    return path, save_shape(path, "mixtral", "gqa")


def engine(path: Path, n_blocks: int = 500, **config: Any) -> Engine:
    return Engine(Paged(path, n_blocks, 4).model, Config(block_size=4, **config))


def asked(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": N, "temperature": 0.0, "ignore_eos": True, "routing": True} | fields))


def run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams, Items[int]]]) -> dict[str, Any]:
    """By request, the tokens and the routing [n, L, K] of an answer; told once, in order, without a gap."""
    for request_id, request in requests.items():
        engine.submit(request_id, *request)
    tokens: dict[str, list[int]] = {request_id: list(request[2]) for request_id, request in requests.items()}
    routing: dict[str, list[np.ndarray]] = {request_id: [] for request_id in requests}
    while engine.has_work():
        for output in engine.step():
            assert output.finish != "error", output.error
            tokens[output.request_id] += output.token_ids
            if output.routing is not None:
                told = routing[output.request_id]
                assert output.routing.start == sum(map(len, told))
                told.append(output.routing.experts_NLK)
                assert output.routing.end < len(tokens[output.request_id]), "a token's experts come after it"
    return {id: (tokens[id], np.concatenate(parts) if parts else None) for id, parts in routing.items()}


@torch.no_grad()
def chosen(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """transformers' choices for every token, [T, L, K]."""
    logits_LTE = torch.stack(model(torch.tensor([ids]), use_cache=False, output_router_logits=True).router_logits)
    return logits_LTE.topk(model.config.num_experts_per_tok).indices.transpose(0, 1).numpy()


def check(model: PreTrainedModel, prompt: list[int], answer: list[int], told: np.ndarray) -> None:
    assert len(told) == len(answer) - 1, "all but the last token"
    clear = gate_margins(model, prompt + answer)[len(prompt) : -1].numpy() > 1e-4
    assert clear.sum() > len(told) // 2
    expected = chosen(model, prompt + answer)[len(prompt) : -1]
    np.testing.assert_array_equal(np.sort(told, 2)[clear], np.sort(expected, 2)[clear])
    first = (told[:, :, 0] == expected[:, :, 0])[clear]
    assert first.mean() > 0.95, "the first choice comes first"


CASES: list[dict[str, Any]] = [
    {},  # captured steps
    {"max_batch_tokens": 7},  # chunks of prompts beside decoding rows, step by step
    {"n_blocks": 34},  # sequences are preempted, and computed anew with their answers
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_what_transformers_chooses(model: tuple[Path, PreTrainedModel], case: dict[str, Any]) -> None:
    path, reference = model
    prompts = {str(i): random_tokens(reference.config.vocab_size, 5 + 9 * i, i) for i in range(4)}
    serving = engine(path, **case)
    answers = run(serving, {id: (prompt, asked(routing=id != "3"), ()) for id, prompt in prompts.items()})
    assert answers.pop("3")[1] is None, "nobody asked for it"
    assert (serving.stats().preemptions > 0) is ("n_blocks" in case)
    for id, (answer, told) in answers.items():
        check(reference, prompts[id], answer, told)


def test_shared_blocks_and_a_continuation_leave_no_gap(
    model: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = model
    prompt = random_tokens(reference.config.vocab_size, 13, 1)
    serving = engine(path)
    first = run(serving, {"a": (prompt, asked(), ())})["a"]
    check(reference, prompt, *first)
    again = run(serving, {"b": (prompt, asked(logprobs=1), ())})["b"]  # of which the cache has prompt and answer
    assert serving.stats().cached_tokens == 12 and again[0] == first[0]
    np.testing.assert_array_equal(again[1], first[1])
    moved = run(serving, {"c": (prompt, asked(), first[0][:9])})["c"]  # on a router that has it all in its cache
    assert moved[0] == first[0]
    np.testing.assert_array_equal(moved[1], first[1])
    monkeypatch.setattr(type(serving.model.experts), "micro_batches", lambda self, n: 2, raising=False)
    cut = run(engine(path), {"d": (prompt, asked(), first[0][:9])})["d"]
    np.testing.assert_array_equal(cut[1], first[1])


def test_it_survives_the_wire_and_a_second_router_tells_it_again() -> None:
    def routing(start: int, n: int) -> Routing:
        return Routing(start, (np.arange(n * 6) + 6 * start).reshape(n, 3, 2).astype(np.int16))

    params = decode_sampling(encode_submit("1", [1], asked()).submit.sampling)
    assert params.routing and not decode_sampling(pb.Sampling()).routing
    merged = pb.Output(request_id="1")
    for i in range(3):  # three steps on a stream that is slow
        merge_output(merged, StepOutput("1", (i,), routing=routing(i - 1, 1) if i else None))
    output = decode_output(merged)
    assert output.token_ids == (0, 1, 2) and output.routing is not None and output.routing.start == 0
    np.testing.assert_array_equal(output.routing.experts_NLK, routing(0, 2).experts_NLK)
    assert decode_output(pb.Output(request_id="1")).routing is None

    entry = Entry("1", [1], params)
    entry.record(output)
    entry.record(StepOutput("1", (3,), routing=routing(0, 3)))  # from the next router, which begins at the beginning
    entry.record(StepOutput("1", (4,), routing=routing(2, 1)))
    told = [entry.outputs.get_nowait().routing for _ in range(3)]
    assert [None if part is None else (part.start, part.end) for part in told] == [(0, 2), (2, 3), None]
