"""`bench gpu` without a GPU: catches a figure that is not measured, or that stands without its floor or its peer, and a
driver of our engine that waits for tokens that never come."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from typer.testing import CliRunner

from cluster.bench.gpu import ceilings, command, exchange, layers, ours, random_model, theirs
from cluster.bench.gpu.ceilings import Ceilings
from cluster.cli import app
from tests.fake_gpu import captures, fake_gpu
from tests.interpreter import quick_interpreter

__all__ = ["captures", "fake_gpu", "quick_interpreter"]
pytestmark = [
    pytest.mark.usefixtures("fake_gpu"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # of the interpreter
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # rows that are padding
]
SPEC = replace(
    random_model.MIXTRAL_8X7B, hidden_size=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, ffn_size=32,
    vocab_size=96, dtype=torch.float16,
)  # fmt: skip
STEP = {"transports": {"grpc": {"us_a_layer": 1.0, "ratio": 0.9, "same_bits": True}}}


class Engine:
    """Either side's, which says what it was asked."""

    capture_seconds = 1.0

    def __init__(self, *arguments: object) -> None: ...
    def decode(self, batch: int, temperature: float = 0.0) -> float:
        return float(batch)

    def prefill(self, n_tokens: int) -> float:
        return float(n_tokens)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that takes a card."""
    monkeypatch.setattr(ceilings.Ceilings, "measure", lambda: Ceilings(4e12, 7e14))
    monkeypatch.setattr(exchange, "in_a_process", lambda n_layers, n_rows: STEP)
    monkeypatch.setattr(layers, "experts_us", lambda: {1: {"expertmesh": 1.0, "grouped_mm": 2.0}})
    monkeypatch.setattr(random_model, "of_depth", lambda n: SPEC)
    monkeypatch.setattr(random_model.RandomModel, "transformers", lambda self: None)
    monkeypatch.setattr(command, "_BLOCKS", 4)
    monkeypatch.setattr(command, "_forget", lambda: None)  # half a second each time
    monkeypatch.setattr(ours, "OurEngine", Engine)
    monkeypatch.setattr(theirs, "Transformers", Engine)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["bench", "gpu", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("measured")
def test_one_command_has_every_figure_beside_its_floor_and_its_peer() -> None:
    said = run("--json")
    found: dict[str, Any] = json.loads(said[said.index("{") :])
    assert found["ceilings"] == {"copy": 4e12, "bf16": 7e14}
    assert [*found["exchange"]] == ["1", "64", "256"]
    assert [*found["models"]] == ["bfloat16", "fp8"]
    for model in found["models"].values():
        assert [*model["decode"]] == ["1", "8", "16", "32", "64", "128", "256"]
        assert [*model["prefill_ms"]] == ["512", "2048", "8192"]
        for figures in (*model["decode"].values(), *model["prefill_ms"].values()):
            assert figures.keys() == {"expertmesh", "floor", "transformers"} and all(figures.values())
    text = run()
    for title in ("experts bfloat16: decoding", "experts fp8: prompts", "torch._grouped_mm", "other processes"):
        assert title in text
    quick = run("--quick", "--layers", "8")
    assert "fp8" not in quick and "256" not in quick
    assert CliRunner().invoke(app, ["bench", "gpu", "--expert-dtype", "fp7"]).exit_code


@pytest.mark.usefixtures("captures")
def test_our_engine_is_driven_to_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CONTEXT", 16)
    monkeypatch.setattr(ours, "STEPS", 3)
    engine = ours.OurEngine(random_model.RandomModel(SPEC, 8, 16), 2, 64)
    assert engine.decode(2) > 0 and engine.decode(1, temperature=0.8) > 0 and engine.prefill(20) > 0
