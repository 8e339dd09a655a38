"""`bench rebalance`. Catches a skewed placement that does not fit, leaves an expert out, or gathers idle experts."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from cluster.bench import rebalance
from cluster.bench.chaos_stream import Stream
from cluster.bench.gateway import Client
from cluster.bench.rebalance import show, skewed
from cluster.errors import ExpertMeshError


def shown(slots: int, workers: int = 3) -> dict[str, Any]:
    return {
        "homes": [[{"expert-0": 1.0}] * 4, [], [{"expert-1": 1.0}] * 4],
        "workers": [{"id": f"expert-{i}", "slots": slots} for i in range(workers)],
        "recent_rows": [[1.0, 9.0, 2.0, 8.0], [0.0] * 4, [7.0, 1.0, 6.0, 2.0]],
    }


@pytest.mark.parametrize(("slots", "hot"), [(5, ({1, 3}, {0, 2})), (3, ({1}, {0})), (0, ({1, 2, 3}, {0, 2, 3}))])
def test_the_busiest_experts_that_fit_are_gathered(slots: int, hot: tuple[set[int], set[int]]) -> None:
    homes = skewed(shown(slots))
    assert homes[1] == [] and all(len(home) == 1 for layer in (0, 2) for home in homes[layer])
    for layer, expected in zip((0, 2), hot, strict=True):
        assert {expert for expert, home in enumerate(homes[layer]) if "expert-0" in home} == expected


def test_one_worker_has_nothing_to_rebalance() -> None:
    with pytest.raises(ExpertMeshError, match="one expert worker"):
        skewed(shown(8, workers=1))


def test_forecast_and_measurement_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    forecast = {"imbalance_before": 2.0, "imbalance_after": 1.01, "gain": 0.495, "moved_replicas": 7}
    receipt = {"forecast": forecast, "imbalance_before": 2.1, "imbalance_since": 1.05, "added": 7, "seconds": 0.5}
    show({"receipt": receipt, "before": 100.0, "after": 125.0, "gain": 0.25})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "forecast: imbalance 2.000 -> 1.010, experts' time -49.5%, 7 replicas to load"
    assert said[1].startswith("measured: imbalance 2.100 -> 1.050, 100.0 -> 125.0 tokens/s (+25.0%)")


@pytest.mark.anyio
async def test_prompts_are_new_ones_and_count_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch prompts that a router finds in its cache, and a rate that tells of answers alone."""
    prompts = []

    async def follow(_: Any, request: dict[str, Any], seen: Stream) -> None:
        prompts.append(tuple(request["prompt"]))
        seen.arrivals += [time.monotonic()] * 3
        if len(prompts) < 4:
            return
        await asyncio.Event().wait()

    monkeypatch.setattr(rebalance, "follow", follow)
    async with rebalance.Traffic(Client("", None, ""), [{"prompt": "a sentence"}] * 2, prompt_tokens=10) as traffic:
        begin = time.monotonic()
        tokens = await traffic.rate(0.2) * (time.monotonic() - begin)
    assert len(set(prompts)) == len(prompts) == 5 and {len(prompt) for prompt in prompts} == {10}
    assert tokens > 40, "each of the prompts counts ten, and its answer two"
