"""Which M:N: the fewest GPUs that meet the targets, or the fastest use of a given number of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.plan.gpu_types import GpuType
from cluster.plan.model_size import ModelSize
from cluster.plan.ours import Layout, Load

MOST_GPUS = 128
_TARGET = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>tok/s|ms)")


@dataclass(frozen=True, slots=True)
class Targets:
    """What a layout has to reach; 0: nothing is asked."""

    tokens_per_s: float = 0.0  # of all sequences together
    ms_per_token: float = 0.0  # of one sequence, at most


def parse_targets(texts: list[str]) -> Targets:
    """`2000 tok/s` and `30 ms`, either or both. Raises ConfigError."""
    found: dict[str, float] = {}
    for text in texts:
        match = _TARGET.fullmatch(text.strip())
        if match is None or float(match["number"]) <= 0:
            raise ConfigError(f'--target {text!r}: expected "NUMBER tok/s" (all sequences) or "NUMBER ms" (per token)')
        found[match["unit"]] = float(match["number"])
    return Targets(found.get("tok/s", 0.0), found.get("ms", 0.0))


def recommend(
    size: ModelSize, gpu: GpuType, load: Load, targets: Targets, n_gpus: int | None, utilization: float = 0.9
) -> Layout:
    """The layout with the fewest GPUs that holds `load` and meets `targets`; of these the fastest.

    With `n_gpus` only layouts of exactly so many are looked at. Raises ConfigError that says what falls short.
    """
    slow: Layout | None = None
    crowded: Layout | None = None
    for total in (n_gpus,) if n_gpus else range(1, MOST_GPUS + 1):
        fitting = [layout for layout in _layouts(size, gpu, total, utilization) if layout.fits]
        roomy = [layout for layout in fitting if layout.kv_tokens >= load.sequences * load.context]
        if not roomy:
            crowded = max(fitting, key=lambda layout: layout.kv_tokens, default=crowded)
            continue
        best = max(roomy, key=lambda layout: layout.tokens_per_s(load))
        fast = best.tokens_per_s(load) >= targets.tokens_per_s
        if fast and (not targets.ms_per_token or best.step_s(load) * 1e3 <= targets.ms_per_token):
            return best
        if slow is None or best.tokens_per_s(load) > slow.tokens_per_s(load):
            slow = best
    where = f"{n_gpus} x {gpu.name}" if n_gpus else f"up to {MOST_GPUS} x {gpu.name}"
    if slow is not None:
        raise ConfigError(
            f"no layout of {where} meets the target: {slow.n_routers} + {slow.n_workers} of them give "
            f"{slow.tokens_per_s(load):,.0f} tok/s, {slow.step_s(load) * 1e3:.1f} ms a token"
        )
    if crowded is not None:
        raise ConfigError(
            f"{where} have KV room for {crowded.kv_tokens:,} tokens, {load.sequences * load.context:,} are asked: "
            f"fewer --sequences, a shorter --context, or more GPUs"
        )
    raise ConfigError(
        f"the model does not fit {where}: experts take {size.experts_bytes / 2**30:,.1f} GiB, "
        f"each router {size.dense_bytes / 2**30:,.1f} GiB"
    )


def _layouts(size: ModelSize, gpu: GpuType, total: int, utilization: float) -> list[Layout]:
    if total == 1:
        return [Layout(size, gpu, 1, 0, utilization)]
    if not size.n_sparse:
        return []  # a dense model is served by one router
    most = size.spec.n_experts * size.n_sparse
    return [Layout(size, gpu, total - n, n, utilization) for n in range(1, min(total, most + 1))]
