"""`gpu_tune` without a GPU: catches rows that the table cannot be read with, weights it does not tune, and a card whose
name is that of others too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks import gpu_tune
from tests.fake_gpu import fake_gpu
from tests.interpreter import quick_interpreter
from workers.kernels.cuda import tiles
from workers.kernels.cuda.tiles import Tile

__all__ = ["fake_gpu", "quick_interpreter"]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of the interpreter
WIDE, NARROW = Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)


def test_rows_of_every_kind_are_written_for_an_unknown_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_gpu: None
) -> None:
    table = Path(shutil.copy(tiles.TABLE, tmp_path))
    monkeypatch.setattr(tiles, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(gpu_tune, "capability", lambda device: (8, 9))
    monkeypatch.setattr(gpu_tune, "candidates", lambda bm: iter((WIDE, NARROW)))
    monkeypatch.setattr(gpu_tune, "graph_us", lambda launch, n, repeats: launch(0) is None or 1.0)
    monkeypatch.setattr(gpu_tune, "_MANY", 2)
    monkeypatch.setattr(gpu_tune, "_PAIRS", dict.fromkeys(gpu_tune._PAIRS, ((1, 16), (None, 16))))
    monkeypatch.setattr(gpu_tune, "_ROWS", ((2, 16), (None, 16)))
    before = json.loads(table.read_text())
    gpu_tune.tune(hidden=64, ffn=128, experts=2, top_k=1, outputs=64)
    content = json.loads(table.read_text())
    assert content["cards"] == [*before["cards"], "GeForce RTX 4090"]
    assert content["alike"]["GeForce RTX 4090"] == ""
    for kind, shape in (*((f"experts {weights}", "64x128") for weights in gpu_tune._PAIRS), ("linear", "64x64")):
        rows = content[kind].pop("GeForce RTX 4090")
        assert [row["rows"] for row in rows[shape]] == [1 if kind != "linear" else 2, None] and rows["any"] == rows[
            shape
        ]
        assert content[kind] == before[kind], "rows of another card"
    tiles.table.cache_clear()
    plan = tiles.expert_plan("GeForce RTX 4090", "8-rows", 64, 128, 1)
    tiles.table.cache_clear()
    assert plan.up == WIDE, "a scale goes with 128 columns"
