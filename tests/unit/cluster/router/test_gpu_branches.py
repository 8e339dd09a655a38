"""Whatever a request may ask for, on a GPU that is not there: catches host and device tensors that meet, what NumPy is
to read of a GPU, and a step ahead of the host that computes with another token than was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from cluster.config import Config
from cluster.models.random import SMALL, write_random
from cluster.placement.placement import striped
from cluster.router.build import build_model, compute_on
from cluster.router.compute import Compute, HostCompute
from cluster.router.device_compute import DeviceCompute
from cluster.router.engine import Engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.grammar import GrammarCompiler, from_json_schema
from cluster.router.params import SamplingParams, StepOutput
from tests.fake_gpu import GPU, OnGpu, captures, fake_gpu
from tests.interpreter import quick_interpreter
from workers.checkpoint import Checkpoint
from workers.kernels.cuda import layer_experts
from workers.kernels.cuda.ops import CudaOps
from workers.kernels.torch.ops import TorchOps
from workers.model.decoder import Decoder
from workers.shard import ExpertShard, load_shard
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer

__all__ = ["captures", "fake_gpu", "quick_interpreter"]
pytestmark = [
    pytest.mark.usefixtures("fake_gpu", "captures"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # of the interpreter
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # rows that are padding
]
SPEC = replace(
    SMALL, hidden_size=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, ffn_size=32, n_experts=4,
    dtype=torch.float16,
)  # fmt: skip
CONFIG = Config(
    router_device="cuda", expert_workers=0, dtype="float16", kv_cache_mb=1, block_size=16, max_sequences=12,
    max_batch_tokens=40, max_queue_wait_s=600,
)  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "routing": {"routing": True},
    "log-probabilities": {"logprobs": 3},
    "log-probabilities of the prompt": {"prompt_logprobs": 2},
    "nothing but those": {"prompt_logprobs": 1, "max_tokens": 0},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {5: 9.0, 7: -100.0}},
    "a list of tokens": {"allowed_ids": (5, 6, 9)},
    "no end before": {"min_tokens": 3, "stop_ids": (7, 8), "ignore_eos": False},
    "words to leave out": {"bad_words": ((5,), (6, 7))},
    "filters": {"top_k": 5, "min_p": 0.05},
    "a grammar": {"grammar": from_json_schema({"type": "integer", "minimum": 0, "maximum": 999})},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "random"
    write_random(path, SPEC)
    return path


def engine_of(checkpoint: Path, model: Decoder, compute: Compute, config: Config = CONFIG) -> Engine:
    return Engine(model, config, GrammarCompiler(checkpoint, model.spec.vocab_size, model.spec.eos_ids), compute)


def answers(engine: Engine, names: list[str], cancelled: str = "") -> dict[str, list[tuple[Any, ...]]]:
    """All that is said to each request, which run together; one is cancelled after its second output."""
    for name in names:
        index = [*REQUESTS].index(name)
        prompt = torch.randint(3, 200, (2 + index,), generator=torch.Generator().manual_seed(index)).tolist()
        params = SamplingParams(**({"max_tokens": 3, "seed": index, "ignore_eos": True} | REQUESTS[name]))
        engine.submit(name, prompt, params, prompt[:1] if name == "routing" else ())  # which goes on from elsewhere
    given: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names}
    while engine.has_work():
        for output in engine.step():
            given[output.request_id].append(said(output))
        if len(given.get(cancelled, ())) == 2:
            engine.cancel(cancelled)
    return given


def said(output: StepOutput) -> tuple[Any, ...]:
    assert output.error is None, f"{output.request_id}: {output.error}"
    scores = [(round(each.logprob, 4), [token for token, _ in each.top]) for each in output.logprobs]
    prompt = [None if each is None else round(each.logprob, 4) for each in output.prompt_logprobs or ()]
    routing = None if output.routing is None else output.routing.experts_NLK.tolist()
    return *output.token_ids, output.finish, scores, prompt, routing


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
    assert isinstance(there, OnGpu) and (there + 1).device == GPU and not isinstance(there.cpu(), OnGpu)
    for mixed in (lambda: there + here, lambda: torch.cat((there, here)), lambda: here.index_select(0, there.long())):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()


def test_every_wish_is_met_a_step_ahead(checkpoint: Path) -> None:
    """As on the host, step by step; in pieces, with one request cancelled, too."""
    model = build_model(CONFIG, checkpoint)
    assert isinstance(model.ops, CudaOps) and model.cache.device == GPU
    compute = compute_on(model, CONFIG)
    assert isinstance(compute, DeviceCompute)
    assert isinstance(model.experts, ExpertShard) and not model.experts.rows_LE().any(), "the start was counted"
    want = answers(engine_of(checkpoint, model, HostCompute(model)), [*REQUESTS])
    assert answers(engine_of(checkpoint, model, compute), [*REQUESTS]) == want
    pieces = replace(CONFIG, max_batch_tokens=4)
    names = ["greedy", "a list of tokens", "bias"]
    given = answers(engine_of(checkpoint, model, compute, pieces), names, cancelled="greedy")
    assert given["greedy"] == want["greedy"][:2]
    assert {name: given[name] for name in names[1:]} == {name: want[name] for name in names[1:]}


def test_every_wish_is_met_in_float32(checkpoint: Path) -> None:
    """For which a GPU has plain torch alone."""
    config = replace(CONFIG, dtype="float32")
    model = build_model(config, checkpoint)
    assert type(model.ops) is TorchOps and model.cache.device == GPU
    compute = compute_on(model, config)
    assert isinstance(compute, HostCompute)
    given = answers(engine_of(checkpoint, model, compute), [*REQUESTS])
    assert all(each[-1][-4] is not None for each in given.values()), "somebody got no end"


@pytest.fixture
def worker(checkpoint: Path) -> Iterator[tuple[ExpertShard, ExpertServer, Credentials]]:
    credentials = Credentials.generate()
    shard = load_shard(Checkpoint(checkpoint, GPU), SPEC.experts, torch.float16)
    shard.warm_up(8)
    assert not shard.rows_LE().any()
    server = ExpertServer(shard, "a", "127.0.0.1", model="m", credentials=credentials)
    server.start()
    yield shard, server, credentials
    server.stop(0)


def test_rows_go_from_gpu_to_gpu_over_grpc(
    checkpoint: Path, worker: tuple[ExpertShard, ExpertServer, Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, server, credentials = worker
    names = ["greedy", "log-probabilities", "routing"]
    alone = build_model(CONFIG, checkpoint)
    want = answers(engine_of(checkpoint, alone, HostCompute(alone)), names)
    transport = GrpcTransport("router-0", "m", credentials)
    exchange = Exchange(
        striped(SPEC.n_layers, SPEC.n_experts, ("a",)), {"a": server.address}, transport, reply_timeout_s=60,
        rejoin_timeout_s=60, device=GPU, dtype=torch.float16,
    )  # fmt: skip
    model = build_model(CONFIG, checkpoint, exchange)
    assert answers(engine_of(checkpoint, model, compute_on(model, CONFIG)), names) == want
    exchange.close()
    # What it says of itself, once a second and to each scrape: in the loop that answers others, so without a copy of
    # each expert's count, which on a GPU comes after all that was launched before.
    copies: list[object] = []
    on_host = layer_experts.on_host
    monkeypatch.setattr(layer_experts, "on_host", lambda *tensors: copies.append(tensors) or on_host(*tensors))
    assert server.numbers()["experts"] == len(SPEC.experts) == len(shard.held)
    assert copies == [], "to say how many experts it holds"
    assert sum(slot.rows for slot in shard.slots) == int(shard.rows_LE().sum()) > 0
    assert len(copies) == 2, "one for the slots, one for the rows"
