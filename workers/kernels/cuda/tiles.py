"""Which tiles a product is computed in: measured ones for known cards and shapes, a default that is right everywhere.

Tiles change the speed of a product and never its bits. `tiles.json` has the rows; `python -m benchmarks.gpu_tune`
writes new ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")

Weights = Literal["16", "8", "8-rows"]  # bits of an expert's weights; rows in 8 bits too


class Tile(NamedTuple):
    """Of one product: BN weight rows by BK, how many warps share it, how many tiles are under way.

    swap: weights are the rows of the tensor core's tile. tma: the bulk copy engine fetches them. group: row blocks that
    run together, 0: all.
    """

    bn: int
    bk: int
    warps: int
    stages: int
    swap: bool = False
    tma: bool = False
    group: int = 0


class LinearPlan(NamedTuple):
    """How to multiply a number of rows with one matrix: `bm` rows a block."""

    bm: int
    tile: Tile


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """How to compute a batch of pairs: at most `bm` pairs of an expert a block."""

    bm: int
    up: Tile
    down: Tile

    def blocks(self, n_pairs: int, n_experts: int) -> int:
        """The most row blocks there can be, whatever the gate chose."""
        return min(n_pairs, n_pairs // self.bm + n_experts)


@cache
def card(device: torch.device) -> str:
    """The card's name as the table has it; "" for one that it does not know."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((known for known in table()["cards"] if known in name), "")


@cache
def table() -> dict[str, Any]:
    """The content of `tiles.json`."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def _row(rows: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """The first row for at least `n`; the last one is for any number."""
    return next((row for row in rows if row["rows"] is None or n <= row["rows"]), rows[-1])


def _rows(kind: str, name: str, shape: str) -> list[dict[str, Any]]:
    """Of this card and shape, of this card, or of any."""
    found = table()[kind]
    of_card = found.get(name) or found[table()["alike"].get(name, "")]
    rows: list[dict[str, Any]] = of_card.get(shape) or of_card["any"]
    return rows


def expert_plan(name: str, weights: Weights, hidden: int, ffn: int, pairs_per_expert: int) -> ExpertPlan:
    """name: the card. pairs_per_expert: of those that are held, on average, rounded up."""
    row = _row(_rows(f"experts {weights}", name, f"{hidden}x{ffn}"), pairs_per_expert)
    return ExpertPlan(row["bm"], Tile(*row["up"]), Tile(*row["down"]))


def linear_plan(name: str, n: int, k: int, n_rows: int) -> LinearPlan:
    """Of `n_rows` rows and a matrix [n, k]."""
    row = _row(_rows("linear", name, f"{n}x{k}"), n_rows)
    return LinearPlan(row["bm"], Tile(*row["tile"]))
