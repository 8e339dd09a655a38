"""The arithmetic of a plan, against the paper's figures, what was measured on GPUs, and its own limits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.errors import CheckpointError, ConfigError
from cluster.plan.gpu_types import GPU_TYPES, gpu_type
from cluster.plan.known_models import spec_of_model
from cluster.plan.model_size import ModelSize
from cluster.plan.ours import Layout, Load
from cluster.plan.recommend import Targets, parse_targets, recommend
from cluster.plan.show import chart_values, comparison
from cluster.plan.tensor_parallel import best_on
from tests.reference import CASES, save_random
from workers.families.registry import read_spec
from workers.weights import FORMATS

MIXTRAL = ModelSize(spec_of_model("mistralai/Mixtral-8x7B-Instruct-v0.1"))
H200, H100 = GPU_TYPES["h200"], GPU_TYPES["h100"]


def test_sizes_are_those_of_the_paper() -> None:
    """arXiv 2401.04088: 47 billion parameters, 13 of them active; an expert of a layer and a token in bf16."""
    assert round(MIXTRAL.parameters / 1e9, 1) == 46.7
    assert round(MIXTRAL.active_parameters / 1e9, 1) == 12.9
    assert round(MIXTRAL.expert_bytes / 1e6) == 352
    assert MIXTRAL.kv_bytes_per_token == 128 * 1024
    large = ModelSize(spec_of_model("mixtral-8x22b"))
    assert (round(large.parameters / 1e9), round(large.active_parameters / 1e9)) == (141, 39)


@pytest.mark.parametrize("family", CASES)
def test_parameters_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """A family whose tensors the arithmetic forgets (shared experts, dense layers) would be planned too small."""
    model = save_random(tmp_path, family=family, hidden=64, ffn=96)
    size = ModelSize(read_spec(tmp_path))
    assert size.parameters == pytest.approx(sum(tensor.numel() for tensor in model.parameters()), rel=0.01)


def test_a_plan_says_what_was_measured() -> None:
    """Sequences of 512 tokens on one H200, all in one process: 2,759 tokens a second for 64 of them in bf16, 143.7 for
    one; with 8-bit weights 4,523."""
    alone = Layout(MIXTRAL, H200, 1, 0)
    assert alone.tokens_per_s(Load(64, 512)) == pytest.approx(2759, rel=0.1)
    assert alone.tokens_per_s(Load(1, 512)) == pytest.approx(143.7, rel=0.1)
    eight_bits = Layout(ModelSize(MIXTRAL.spec, FORMATS["fp8"]), H200, 1, 0)
    assert eight_bits.tokens_per_s(Load(64, 512)) == pytest.approx(4523, rel=0.15)


def test_what_is_recommended_fits_and_one_less_does_not() -> None:
    load = Load(64, 4096)
    for gpu in GPU_TYPES.values():
        best = recommend(MIXTRAL, gpu, load, Targets(), None)
        assert best.fits and best.kv_tokens >= 64 * 4096
        if best.n_gpus > 1:
            with pytest.raises(ConfigError, match=r"fit|KV room"):
                recommend(MIXTRAL, gpu, load, Targets(), best.n_gpus - 1)


def test_more_is_never_slower() -> None:
    """A ratio M:N that is worse than one with fewer GPUs would be a fault of the search."""
    load = Load(128, 2048)
    speeds = [recommend(MIXTRAL, H100, load, Targets(), n).tokens_per_s(load) for n in range(3, 9)]
    assert speeds == sorted(speeds)
    fast = recommend(MIXTRAL, H100, load, parse_targets(["6000 tok/s", "25 ms"]), None)
    assert fast.tokens_per_s(load) >= 6000 and fast.step_s(load) <= 0.025


def test_memory_and_traffic_add_up() -> None:
    layout = Layout(MIXTRAL, H100, 1, 4)
    assert layout.worker_bytes == (64 + 1) * MIXTRAL.expert_bytes + 2**29
    assert layout.kv_bytes + layout.router_bytes == layout.budget
    # Two of eight experts on four workers of two: both on one worker in 1 of 7 cases.
    assert MIXTRAL.workers_asked(4) == pytest.approx(2 - 1 / 7)
    assert layout.traffic(64) == pytest.approx(64 * (2 - 1 / 7 + 2) * 8192)
    assert layout.one_host and not Layout(MIXTRAL, H100, 4, 8).one_host


def test_the_comparison_is_honest() -> None:
    """Few coarse experts on few GPUs: tensor parallelism reads everything at once, and the plan has to say so."""
    load = Load(64, 4096)
    layout = recommend(MIXTRAL, H100, load, Targets(), 4)
    rival = best_on(MIXTRAL, H100, 4, load)
    assert rival is not None and rival.tokens_per_s(load) > layout.tokens_per_s(load)
    assert "as much: take experts of their own for what else" in comparison(layout, load)
    assert best_on(ModelSize(spec_of_model("mixtral-8x22b")), GPU_TYPES["l4"], 4, load) is None


def test_values_are_for_one_pod_where_device_memory_reaches_all() -> None:
    load = Load(64, 4096)
    values = yaml.safe_load(chart_values(Layout(MIXTRAL, H100, 2, 6), load, "m"))
    assert values["routers"]["routersPerPod"] == 2 and values["routers"]["expertWorkersPerPod"] == 6
    assert values["routers"]["resources"]["limits"] == {"memory": "256Gi"} and values["experts"]["replicas"] == 0
    spread = yaml.safe_load(chart_values(Layout(MIXTRAL, H100, 2, 8), load, "m"))
    assert (spread["routers"]["replicas"], spread["experts"]["replicas"]) == (2, 8)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("memory_gib: 96", "lacks name, memory_tb_s"),
        ("name: x\nmemory: 96", "expected `field: value`"),
        ("name: x\nmemory_gib: -1", "not a positive number"),
        ("- 1", "expected `field: value`"),
        ("a: [", "--gpu"),
    ],
)
def test_a_gpu_of_ones_own(file: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.yaml"
    path.write_text(file)
    with pytest.raises(ConfigError, match=says):
        gpu_type(str(path))
    path.write_text("\n".join(f"{key}: 100" for key in ("memory_gib", "memory_tb_s", "bf16_tflops", "fp8_tflops",
                                                        "link_gb_s", "network_gb_s")) + "\nname: mine\n")  # fmt: skip
    assert gpu_type(str(path)).name == "mine"


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["plan", "--model", "mixtral-8x7b", "--gpu", "h100"]).output
    assert "46.7 B parameters, 12.9 B active" in shown and "352 MB" in shown and "128 KiB" in shown
    assert "1 router + 2 expert workers, a h100 each" in shown and "Tensor parallelism" in shown
    figures = json.loads(run(app, ["plan", "--model", "mixtral-8x7b", "--gpu", "h100", "-o", "json"]).output)
    assert figures["tokens_per_s"] == pytest.approx(64 / figures["step_s"])
    save_random(tmp_path, hidden=64)
    own = json.loads(run(app, ["plan", "--model", str(tmp_path), "--gpu", "l4", "-o", "json"]).output)
    assert (own["routers"], own["expert_workers"]) == (1, 0)
    for arguments, says in (
        (["--gpu", "h1000"], "neither a file nor one of b200"),
        (["--gpu", "l4", "--gpus", "2"], "does not fit 2 x l4"),
        (["--gpu", "h100", "--target", "fast"], "expected .NUMBER tok/s"),
        (["--gpu", "h100", "--target", "900000 tok/s"], "no layout of up to 128 x h100 meets the target"),
        (["--gpu", "h100", "--gpus", "3", "--sequences", "9999"], "KV room for"),
    ):
        failed = run(app, ["plan", "--model", "mixtral-8x7b", *arguments])
        assert failed.exit_code == 1 and re.search(says, failed.output), failed.output
    with pytest.raises(CheckpointError, match=r"no directory or config\.json"):
        spec_of_model("no such model")
