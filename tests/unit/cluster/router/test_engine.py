"""The step loop over a real small model: what comes out is what transformers computes, whatever the schedule.

Catches: a token, position or block mixed up between sequences, chunks, preemptions and continuations; blocks that stay
taken after a cancellation or a failed step.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from cluster.config import Config
from cluster.errors import RequestError, WorkerLost
from cluster.router.batching import logits_wanted
from cluster.router.engine import Engine
from cluster.router.params import SamplingParams, StepOutput
from cluster.router.sampler import Sampler
from cluster.router.scheduler import Chunk, Scheduler
from cluster.router.sequence import Sequence
from tests.reference import TOLERANCE, Paged, random_tokens, reference_logits, save_shape

STEPS = 64


class Model:
    """A directory with transformers' model of it; `engine` makes engines over it."""

    def __init__(self, directory: Path, shape: str) -> None:
        self.directory = directory
        self.reference: PreTrainedModel = save_shape(directory, "mixtral", shape)
        self.vocab_size: int = self.reference.config.vocab_size

    def engine(self, n_blocks: int = 500, **config: Any) -> Engine:
        return Engine(Paged(self.directory, n_blocks, 4).model, Config(block_size=4, **config))

    def prompt(self, n: int, seed: int = 0) -> list[int]:
        return random_tokens(self.vocab_size, n, seed)

    def check_greedy(self, prompt_ids: list[int], token_ids: list[int]) -> None:
        """Each token is transformers' likeliest after those before it, or within TOLERANCE of it."""
        logits_NV = reference_logits(self.reference, prompt_ids + token_ids)[len(prompt_ids) - 1 : -1]
        behind = [(row.max() - row[token]).item() for row, token in zip(logits_NV, token_ids, strict=True)]
        assert max(behind) < TOLERANCE, behind


@pytest.fixture(scope="module", params=["gqa", "window", "odd_sizes"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("gqa"), "gqa")


def greedy(max_tokens: int = STEPS, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **params)


def seeded(seed: int, max_tokens: int = STEPS) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, top_p=0.95, repetition_penalty=1.2,
                          frequency_penalty=0.3, seed=seed, ignore_eos=True)  # fmt: skip


def finish(engine: Engine) -> dict[str, list[StepOutput]]:
    """Step until there is nothing to do; the outputs by request."""
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    stats = engine.stats()
    assert (stats.free_blocks, stats.running, stats.waiting) == (stats.total_blocks, 0, 0)
    return outputs


def tokens(outputs: Items[StepOutput]) -> list[int]:
    assert [output.finish is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    assert outputs[-1].finish in ("stop", "length"), outputs[-1].error
    return [token for output in outputs for token in output.token_ids]


def run(engine: Engine, prompt_ids: list[int], params: SamplingParams, emitted_ids: Items[int] = ()) -> list[int]:
    engine.submit("alone", prompt_ids, params, emitted_ids)
    return tokens(finish(engine)["alone"])


def test_alone_it_says_what_transformers_says(any_model: Model) -> None:
    prompt_ids = any_model.prompt(37)
    token_ids = run(any_model.engine(), prompt_ids, greedy())
    assert len(token_ids) == STEPS
    any_model.check_greedy(prompt_ids, token_ids)


@pytest.mark.parametrize(
    ("n_blocks", "config"),
    [(900, {}), (900, {"max_batch_tokens": 23}), (70, {"max_batch_tokens": 40, "max_sequences": 9})],
    ids=["roomy", "chunked", "tiny_pool"],
)
def test_a_mixed_batch_of_16_says_what_transformers_says(
    any_model: Model, n_blocks: int, config: dict[str, Any]
) -> None:
    engine = any_model.engine(n_blocks, **config)
    prompts = {f"r{i}": any_model.prompt(1 + 9 * i, seed=i) for i in range(16)}
    for name, prompt_ids in prompts.items():
        engine.submit(name, prompt_ids, greedy())
    outputs = finish(engine)
    assert (engine.stats().preemptions > 0) == (n_blocks == 70)
    for name, prompt_ids in prompts.items():
        any_model.check_greedy(prompt_ids, tokens(outputs[name]))


def test_sampled_tokens_are_the_same_alone_and_in_a_crowd_that_is_preempted(model: Model) -> None:
    crowded = model.engine(60, max_batch_tokens=30)
    prompts = {seed: model.prompt(3 + 7 * seed, seed) for seed in range(10)}
    for seed, prompt_ids in prompts.items():
        crowded.submit(str(seed), prompt_ids, seeded(seed))
    outputs = finish(crowded)
    assert crowded.stats().preemptions > 0
    engine = model.engine()
    for seed, prompt_ids in prompts.items():
        assert tokens(outputs[str(seed)]) == run(engine, prompt_ids, seeded(seed))


@pytest.mark.parametrize("params", [greedy(), seeded(5)], ids=["greedy", "seeded"])
def test_a_continued_request_gives_the_rest_of_the_tokens(model: Model, params: SamplingParams) -> None:
    prompt_ids = model.prompt(21)
    whole = run(model.engine(), prompt_ids, params)
    engine = model.engine()
    for cut in (1, 30, STEPS - 1):
        assert whole[:cut] + run(engine, prompt_ids, params, whole[:cut]) == whole
    engine.submit("complete", prompt_ids, params, whole)
    assert finish(engine)["complete"] == [StepOutput("complete", (), finish="length")]


def test_cancelling_at_random_points_frees_all_and_changes_nobody_else(model: Model) -> None:
    choice = random.Random(4)
    engine, alone = model.engine(60, max_batch_tokens=25), model.engine()
    prompts = {str(i): model.prompt(choice.randrange(1, 60), i) for i in range(24)}
    got: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt_ids in prompts.items():
        engine.submit(name, prompt_ids, seeded(int(name), max_tokens=20))
    cancelled = set(choice.sample(sorted(prompts), 12))
    due = {name: choice.randrange(120) for name in cancelled}
    for step in range(2000):
        for name in [name for name, at in due.items() if at == step]:
            engine.cancel(name)
            due.pop(name)
            got[name].append(-1)
        for output in engine.step():
            assert -1 not in got[output.request_id], "output after a cancellation"
            got[output.request_id] += output.token_ids
        if not engine.has_work() and not due:
            break
    stats = engine.stats()
    assert (stats.free_blocks, stats.running, stats.waiting) == (60, 0, 0)
    engine.cancel("no such request")
    for name in sorted(set(prompts) - cancelled):
        assert got[name] == run(alone, prompts[name], seeded(int(name), max_tokens=20))


@pytest.mark.parametrize("fails", [False, True], ids=["goes_on", "fails"])
def test_cancelling_while_a_step_waits_for_experts_frees_the_blocks_at_once(
    model: Model, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    engine = model.engine(60)
    waiting, go_on = threading.Event(), threading.Event()
    combine = engine.model.experts.combine

    def wait_for_a_worker(handle: object) -> object:
        waiting.set()
        assert go_on.wait(30)
        if fails:
            raise WorkerLost("expert-1", "no replica within 120 s")
        return combine(handle)

    prompts = {name: model.prompt(9 + i, i) for i, name in enumerate("abc")}
    for name, prompt_ids in prompts.items():
        engine.submit(name, prompt_ids, greedy(6))
    got: list[StepOutput] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.experts, "combine", wait_for_a_worker)
        step = threading.Thread(target=lambda: got.extend(engine.step()))
        step.start()
        assert waiting.wait(30)
        engine.cancel("a")
        engine.cancel("c")
        assert (engine.stats().free_blocks, engine.stats().running) == (60 - 3, 1)  # b has 10 tokens in blocks of 4
        go_on.set()
        step.join()
    assert [(output.request_id, output.finish) for output in got] == [("b", "error" if fails else None)]
    engine.submit("d", prompts["a"], greedy(6))
    rest = finish(engine)
    assert tokens(rest["d"]) == run(model.engine(), prompts["a"], greedy(6))
    if not fails:
        assert [*got[0].token_ids, *tokens(rest["b"])] == run(model.engine(), prompts["b"], greedy(6))
    assert engine.stats().free_blocks == 60


@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 7}, {"max_sequences": 3}], ids=str)
def test_log_probabilities_of_prompt_and_answer(model: Model, config: dict[str, Any]) -> None:
    engine = model.engine(24, **config)  # tight: prompts are computed anew, but scored once
    prompts = {str(i): model.prompt(1 + 11 * i, i) for i in range(4)}
    params = SamplingParams(max_tokens=30, seed=3, temperature=0.5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    for name, prompt_ids in prompts.items():
        engine.submit(name, prompt_ids, params)
    for name, outputs in finish(engine).items():
        prompt_ids, token_ids = prompts[name], tokens(outputs)
        expected_NV = reference_logits(model.reference, prompt_ids + token_ids).log_softmax(-1)
        assert [output.prompt_logprobs is not None for output in outputs] == [True] + [False] * 29
        scores = [*(outputs[0].prompt_logprobs or ()), *(output.logprobs[0] for output in outputs)]
        assert scores[0] is None and len(scores) == len(prompt_ids) + 30
        for position, score in enumerate(scores[1:], 1):
            assert score is not None
            row_V = expected_NV[position - 1]
            n_top = 2 if position < len(prompt_ids) else 3
            assert score.logprob == pytest.approx(row_V[(prompt_ids + token_ids)[position]].item(), abs=TOLERANCE)
            assert [p for _, p in score.top] == pytest.approx(row_V.topk(n_top).values.tolist(), abs=TOLERANCE)


def test_long_prompts_are_scored_a_few_rows_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.engine(max_batch_tokens=512)
    forward, widths = engine.model.forward, []

    def widened(batches, observer=None):  # type: ignore[no-untyped-def]
        widths.append(batches[0].n_rows)
        return forward(batches, observer)

    monkeypatch.setattr(engine.model, "forward", widened)
    for name in "abc":
        engine.submit(name, model.prompt(200), SamplingParams(max_tokens=1, prompt_logprobs=0))
    for outputs in finish(engine).values():
        assert len(outputs[0].prompt_logprobs or ()) == 200
    assert max(widths) <= 130 and sum(widths) == 600


@pytest.mark.parametrize(("computed", "n", "wanted"), [(0, 100, 0), (0, 256, 0), (200, 80, 24), (256, 44, 44)])
def test_a_prompt_preempted_between_its_scores_shifts_nobody_elses_rows(computed: int, n: int, wanted: int) -> None:
    sequence = Sequence("x", range(300), SamplingParams(max_tokens=1, prompt_logprobs=0))
    sequence.prompt_logprobs = [None] * 257  # rows 0 to 255 gave theirs
    sequence.computed = computed
    assert logits_wanted(Chunk(sequence, n)) == wanted


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_prompt_can_be_scored_without_an_answer(model: Model, n: int) -> None:
    engine = model.engine()
    engine.submit("score", model.prompt(n), SamplingParams(max_tokens=0, prompt_logprobs=0))
    (output,) = finish(engine)["score"]
    assert (output.token_ids, output.finish, len(output.prompt_logprobs or ())) == ((), "length", n)


def test_prompts_that_begin_alike_share_what_is_computed(model: Model) -> None:
    """The same tokens as without, fewer rows, and no block left behind; other salts share nothing."""
    shared = model.prompt(40)
    prompts = [shared + model.prompt(n, seed=n) for n in (1, 7, 2, 30, 11)] + [shared]
    given: dict[bool, list[list[int]]] = {}
    rows: dict[bool, int] = {}
    for cached in (False, True):
        engine = model.engine(prefix_cache=cached, max_batch_tokens=16)
        first = run(engine, shared, seeded(99, 9))
        before = engine.stats().rows
        for i, prompt_ids in enumerate(prompts):
            engine.submit(str(i), prompt_ids, seeded(i, 9))
        answers = finish(engine)
        rows[cached] = engine.stats().rows - before
        given[cached] = [first, *(tokens(answers[str(i)]) for i in range(len(prompts)))]
        assert engine.stats().cached_tokens == (36 + 5 * 40 if cached else 0)
        run(engine, shared, SamplingParams(max_tokens=1, cache_salt="other"))
        assert engine.stats().cached_tokens == (36 + 5 * 40 if cached else 0)
    assert given[True] == given[False]
    assert rows[False] - rows[True] == 36 + 5 * 40


def test_cut_into_micro_batches_it_says_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {str(i): model.prompt(5 + 8 * i, i) for i in range(5)}
    results = []
    for n in (1, 3):
        engine = model.engine(max_batch_tokens=50)
        monkeypatch.setattr(engine.model.experts, "micro_batches", lambda n_rows, n=n: n)
        for name, prompt_ids in prompts.items():
            engine.submit(name, prompt_ids, greedy(12))
        results.append({name: tokens(outputs) for name, outputs in finish(engine).items()})
    assert results[0] == results[1]


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_failed_step_ends_its_own_requests_and_no_other(
    model: Model, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = model.engine(max_sequences=2)
    for name in "abc":
        engine.submit(name, model.prompt(6), greedy(5))
    if when == "decode":
        engine.step()
    steps: list[int] = []

    def lost(*_: object) -> None:
        raise WorkerLost("expert-1", "no reply within 10 s")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.experts, "begin_step", steps.append)
        patch.setattr(engine.model.experts, "dispatch", lost)
        failed = engine.step()
    assert {(output.request_id, output.finish) for output in failed} == {("a", "error"), ("b", "error")}
    assert not any("expert-1" in str(output.error) for output in failed), "which of our processes it was is for the log"
    assert steps == [engine.stats().steps]
    outputs = finish(engine)
    assert set(outputs) == {"c"}
    model.check_greedy(model.prompt(6), tokens(outputs["c"]))


@pytest.mark.parametrize("owner", [Scheduler, Sampler], ids=["scheduling", "sampling"])
def test_a_step_that_fails_anywhere_ends_every_request_it_concerns(
    model: Model, monkeypatch: pytest.MonkeyPatch, owner: type
) -> None:
    """Would catch an exception that ends the step loop, or requests whose client waits for ever."""
    engine = model.engine()
    for name in "ab":
        engine.submit(name, model.prompt(6), greedy(5))

    def broken(*_: object) -> None:
        raise ValueError("half written")

    with monkeypatch.context() as patch:
        patch.setattr(owner, "schedule" if owner is Scheduler else "sample", broken)
        failed = engine.step()
    assert [(output.request_id, output.finish) for output in failed] == [("a", "error"), ("b", "error")]
    assert not engine.has_work()
    for output in failed:  # what failed is in the log, not for clients
        assert output.error is not None and "half written" not in str(output.error) and output.error.status == 500
    assert engine.stats().free_blocks == engine.stats().total_blocks
    model.check_greedy(model.prompt(6), run(engine, model.prompt(6), greedy(5)))


def test_what_ends_an_answer(model: Model) -> None:
    prompt_ids = model.prompt(6)
    plain = run(model.engine(), prompt_ids, greedy(12))
    third = plain[2]
    first = plain.index(third)
    assert run(model.engine(), prompt_ids, greedy(12, stop_ids=(third,))) == plain[: first + 1]
    engine = model.engine()
    engine.submit("s", prompt_ids, greedy(12, stop_ids=(third,)))
    assert finish(engine)["s"][-1].finish == "stop"
    # The same token as the model's own end of sequence.
    ends = engine.model.spec.eos_ids
    biased = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={ends[0]: 100.0})
    assert run(engine, prompt_ids, biased) == [ends[0]]
    longer = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={ends[0]: 100.0}, min_tokens=4)
    answer = run(engine, prompt_ids, longer)
    assert len(answer) == 5 and answer.index(ends[0]) == 4
    # Its router died after the last token, before it could say so.
    engine.submit("late", prompt_ids, biased, [ends[0]])
    assert finish(engine)["late"] == [StepOutput("late", (), finish="stop")]


@pytest.mark.parametrize(
    ("prompt_ids", "params", "emitted_ids", "code", "param"),
    [
        ([1] * 100, greedy(413), (), "context_length_exceeded", None),
        ([1] * 40, greedy(42), (), "context_length_exceeded", None),
        ([], greedy(), (), "invalid_value", "prompt"),
        ([97], greedy(), (), "invalid_value", "prompt"),
        ([1], greedy(2), (1, 2, 3), "invalid_value", "emitted_ids"),
        ([1], greedy(), (97,), "invalid_value", "emitted_ids"),
        ([1], greedy(logprobs=21), (), "invalid_value", "logprobs"),
        ([1], SamplingParams(max_tokens=0), (), "invalid_value", "max_tokens"),
        ([1], SamplingParams(max_tokens=1, temperature=float("nan")), (), "invalid_value", "temperature"),
        ([1], SamplingParams(max_tokens=1, seed=-1), (), "invalid_value", "seed"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    model: Model, prompt_ids: list[int], params: SamplingParams, emitted_ids: Items[int], code: str, param: str | None
) -> None:
    engine = model.engine(20 if len(prompt_ids) == 40 else 500)
    with pytest.raises(RequestError) as caught:
        engine.submit("x", prompt_ids, params, emitted_ids)
    assert (caught.value.code, caught.value.status) == (code, 400)
    assert param is None or caught.value.param == param
    assert not engine.has_work()


def test_an_id_is_in_use_until_its_request_ends(model: Model) -> None:
    engine = model.engine()
    engine.submit("x", [1], greedy(2))
    with pytest.raises(RequestError, match="in use"):
        engine.submit("x", [1], greedy(2))
    finish(engine)
    engine.submit("x", [1], greedy(2))
    assert len(tokens(finish(engine)["x"])) == 2


def test_no_block_is_lost_whatever_ends_requests(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared prompts, several tenants, a pool that is too small, clients that leave, steps that fail; every block is
    free when all is over. `EXPERTMESH_REQUESTS=10000` for more requests."""
    n_requests, chance = int(os.environ.get("EXPERTMESH_REQUESTS", "300")), random.Random(1)
    engine = model.engine(60, max_batch_tokens=64, max_sequences=8, max_queue=64)
    starts = [model.prompt(n, seed=n) for n in (5, 16, 33, 40)]
    open_, ended, preempted = set[str](), 0, 0
    for i in range(n_requests):
        prompt_ids = [*chance.choice(starts), *model.prompt(chance.randrange(1, 12), seed=i)]
        params = greedy(chance.randrange(1, 12), tenant=chance.choice("abc"), cache_salt=chance.choice(["", "s"]))
        engine.submit(str(i), prompt_ids, params, [1] * chance.randrange(params.max_tokens) if i % 7 == 0 else ())
        open_.add(str(i))
        if i % 5 == 0:
            engine.cancel(gone := chance.choice(sorted(open_)))
            open_.discard(gone)
        with monkeypatch.context() as patch:
            if i % 50 == 49:
                patch.setattr(Sampler, "sample", lambda *_: 1 / 0)
            steps = engine.step() if i % 3 else []
        while len(open_) > 40:
            steps += engine.step()
        done = {output.request_id for output in steps if output.finish is not None}
        ended, open_ = ended + len(done), open_ - done
    ended += len(finish(engine))
    preempted = engine.stats().preemptions
    assert preempted and ended > n_requests * 0.7
    assert engine.stats().cached_tokens > n_requests
    assert not any(engine._blocks._owners), "a block has an owner and nobody knows whom"
