"""The routing trace: what it counts, what a file of it may be, and that serving does not depend on it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from cluster.config import Config
from cluster.errors import TraceError
from cluster.router.build import build_engine
from cluster.router.params import SamplingParams
from cluster.routing.counts import RoutingCounts, random_first, random_shared
from cluster.routing.recorder import RoutingTrace
from cluster.routing.trace import Header, Window, append, read_trace
from tests.reference import gate_choices, random_tokens, save_random

HEADER = Header("tiny", 3, 8, 2, 1.0)


def counts(seed: int = 0) -> RoutingCounts:
    made = RoutingCounts.zeros(3, 8)
    rng = np.random.default_rng(seed)
    for layer in range(3):
        made.count(layer, (0, 5, 12), np.stack([rng.permutation(8)[:2] for _ in range(12)]))
    return made


def test_counts_of_a_hand_made_case() -> None:
    """Would catch a pair counted across two sequences, or a second choice taken for a first."""
    made = RoutingCounts.zeros(1, 4)
    made.count(0, (0, 3, 5), np.array([[0, 1], [0, 2], [2, 3], [2, 3], [1, 0]]))
    assert made.first_LE.tolist() == [[2, 1, 2, 0]]
    assert made.chosen_LE.tolist() == [[3, 2, 3, 2]]
    # 0-1: same first; 1-2: 2 in common; 2-3: another sequence; 3-4: nothing in common
    assert (made.consecutive_L[0], made.same_first_L[0], made.shared_L[0]) == (3, 1, 2)
    made.count(0, None, np.array([[0, 1], [0, 1]]))
    assert made.consecutive_L[0] == 3 and made.tokens == 7


def test_random_choices_repeat_as_often_as_the_paper_says() -> None:
    assert random_first(8) == 0.125
    assert abs(random_shared(8, 2) - 0.46) < 0.005
    assert random_shared(4, 4) == 1 and random_shared(8, 1) == random_first(8)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_is_whole_after_every_window(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for seed in range(3):
        append(path, HEADER, Window("router-0", 10.0 * seed, 10.0, counts(seed)))
    trace = read_trace(path)
    assert trace.header == HEADER and [window.began for window in trace.windows] == [0.0, 10.0, 20.0]
    assert (trace.total().chosen_LE == sum(counts(seed).chosen_LE for seed in range(3))).all()
    append(tmp_path / "b.jsonl", HEADER, Window("router-1", 0.0, 10.0, counts(7)))
    assert len(read_trace(tmp_path).windows) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no routing trace"),
        (b"hello\n", "cannot be read"),
        (b'{"format": "something else"}\n', "no routing trace"),
        (b"[1]\n", "cannot be read"),
        (b'{"format":"expertmesh-routing-trace-1","model":"m","n_layers":1,"n_experts":2,"top_k":1,"sample":1}\n',
         "nothing was counted"),
        (b'{"format":"expertmesh-routing-trace-1","model":"m","n_layers":1,"n_experts":2,"top_k":1,"sample":1}\n'
         b'{"name":"x","began":0,"seconds":1,"first_LE":[[1]],"chosen_LE":[[1,2]],"consecutive_L":[0],'
         b'"same_first_L":[0],"shared_L":[0]}\n', "do not fit"),
    ],
)  # fmt: skip
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=said) as raised:
        read_trace(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_missing_cut_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone\.jsonl"):
        read_trace(tmp_path / "gone.jsonl")
    with pytest.raises(TraceError, match=r"no \*\.jsonl"):
        read_trace(tmp_path)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps({"format": "x"}).encode())[:-9])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(cut)
    cut.unlink()
    append(tmp_path / "a.jsonl", HEADER, Window("r", 0, 1, counts()))
    other = Header("other", 3, 8, 1, 1.0)
    append(tmp_path / "b.jsonl", other, Window("r", 0, 1, counts()))
    with pytest.raises(TraceError, match="another model"):
        read_trace(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    directory = tmp_path_factory.mktemp("model")
    return directory, save_random(directory)


def test_traced_traffic_is_what_transformers_chooses(model: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """Would catch a buffer that was used again before it was counted, rows counted twice, and steps left out: prompts
    in chunks beside decoding sequences, all layers."""
    directory, theirs = model
    path = tmp_path / "traces" / "router-0.jsonl.gz"
    trace = RoutingTrace(path, "router-0", HEADER)
    engine = build_engine(Config(kv_cache_mb=1, max_batch_tokens=64, prefix_cache=False), directory, trace=trace)
    prompts = {f"request {i}": random_tokens(97, 70 + 30 * i, seed=i) for i in range(3)}
    told = {name: list(prompt) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    while engine.has_work():
        for output in engine.step():
            told[output.request_id] += output.token_ids
    trace.close()
    total = read_trace(path).total()
    expected_LE = np.zeros((3, 8), np.int64)
    for name, ids in told.items():
        chosen_LTK = gate_choices(theirs, ids[:-1])  # the last token was drawn and never computed
        expected_LE[:2] += [np.bincount(ids_TK.ravel(), minlength=8) for ids_TK in chosen_LTK[:2]]
        answer_TK = chosen_LTK[2][len(prompts[name]) - 1 :]  # of a prompt the last layer is asked for the last row
        expected_LE[2] += np.bincount(answer_TK.ravel(), minlength=8)
    assert (total.chosen_LE[:2] == expected_LE[:2]).all()
    assert total.chosen_LE[2].sum() >= expected_LE[2].sum()
    assert total.consecutive_L[0] > 0 and (total.same_first_L <= total.shared_L).all()


def test_a_few_tokens_are_not_told_and_a_full_disk_ends_the_trace_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows of few tokens would tell what they were."""
    trace = RoutingTrace(tmp_path / "few.jsonl", "router-0", HEADER, window_s=0.01)
    for layer in range(3):
        trace.chosen(layer, (0, 20), torch.zeros(20, 2, dtype=torch.int64), torch.ones(20, 2))
    trace.close()
    assert not (tmp_path / "few.jsonl").exists()

    trace = RoutingTrace(tmp_path / "taken.jsonl", "router-0", HEADER, window_s=0.01)
    assert trace.observer() is trace
    (tmp_path / "taken.jsonl").mkdir()  # a directory cannot be appended to
    trace.chosen(0, (0, 300), torch.zeros(300, 2, dtype=torch.int64), torch.ones(300, 2))
    trace.close()
    assert "routing trace ends" in caplog.text
    assert trace.observer() is None


def test_a_trace_goes_on_where_it_was_and_not_in_that_of_another_model(tmp_path: Path) -> None:
    """Would catch windows of two models in one file, which nobody could read any more."""
    path = tmp_path / "router-0.jsonl.gz"
    append(path, HEADER, Window("router-0", 0, 1, counts()))
    trace = RoutingTrace(path, "router-0", HEADER)
    trace.chosen(0, (0, 300), torch.zeros(300, 2, dtype=torch.int64), torch.ones(300, 2))
    trace.close()
    assert len(read_trace(path).windows) == 2
    with pytest.raises(TraceError, match="another model or sample"):
        RoutingTrace(path, "router-0", Header("other", 3, 8, 2, 1.0))
