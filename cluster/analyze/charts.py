"""The charts of an analysis, as PNG files. The one module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.analyze.analysis import INFORMATION, Analysis
from cluster.errors import ExpertMeshError
from cluster.routing.counts import random_first, random_shared

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ExpertMeshError("the charts need matplotlib; install it with: pip install 'expertmesh[analyze]'") from error

_MOST_BARS = 32  # experts of a layer that can be told apart as bars

Draw = Callable[[Analysis, Sequence[int]], Figure]


def write_charts(analysis: Analysis, shown: Sequence[int], directory: Path) -> dict[str, Path]:
    """Every chart, by title. shown: the layers, as places in `analysis.layers`, of charts that show only some."""
    charts: dict[str, tuple[str, Draw]] = {
        "Share of tokens by expert, choice and domain": ("expert_share", _expert_share),
        "Repeated assignment of consecutive tokens": ("repetition", _repetition),
        "What the first choice tells of a token": ("information", _information),
        "Evenness of the load": ("evenness", _evenness),
        "Load of every expert": ("load", _load),
    }
    if analysis.top_k > 1:
        charts["Experts that are chosen together"] = ("together", _together)
    written = {}
    for title, (name, draw) in charts.items():
        written[title] = directory / f"{name}.png"
        draw(analysis, shown).savefig(written[title], dpi=130)
    return written


def _expert_share(analysis: Analysis, shown: Sequence[int]) -> Figure:
    """Figure 7 of the paper, and figures 9 and 10 of its appendix."""
    choices = [("first choice", 0, 1), ("second choice", 1, 2), ("any choice", 0, analysis.top_k)]
    choices = choices if analysis.top_k > 1 else choices[:1]
    figure = Figure(figsize=(5.2 * len(choices), 2.1 * len(shown) + 0.6), layout="constrained")
    grid = figure.subplots(len(shown), len(choices), squeeze=False, sharex=True)
    for row, layer in zip(grid, shown, strict=True):
        for axes, (name, first, end) in zip(row, choices, strict=True):
            share_DE = np.stack([analysis.share(d, layer)[first:end].sum(0) for d in range(len(analysis.domains))])
            axes.set_title(f"layer {analysis.layers[layer]}, {name}", fontsize=9)
            if analysis.n_experts > _MOST_BARS:
                image = axes.imshow(share_DE, aspect="auto", interpolation="nearest", vmin=0)
                axes.set_yticks(range(len(analysis.domains)), analysis.domains, fontsize=7)
                figure.colorbar(image, ax=axes)
                continue
            width = 0.8 / len(analysis.domains)
            for d, (domain, share_E) in enumerate(zip(analysis.domains, share_DE, strict=True)):
                at_E = np.arange(analysis.n_experts) + (d - (len(analysis.domains) - 1) / 2) * width
                axes.bar(at_E, share_E, width, label=domain, color=f"C{d}")
            axes.axhline((end - first) / analysis.n_experts, color="gray", ls="--", lw=1)
            axes.set_xticks(range(analysis.n_experts))
    if analysis.n_experts <= _MOST_BARS:
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    grid[-1][0].set_xlabel("expert")
    return figure


def _repetition(analysis: Analysis, shown: Sequence[int]) -> Figure:
    """Table 5 of the paper, for all layers."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    chance = (random_first(analysis.n_experts), random_shared(analysis.n_experts, analysis.top_k))
    names = ("same first choice", "an expert in common")
    for which, (axes, name, by_chance) in enumerate(zip(figure.subplots(1, 2), names, chance, strict=True)):
        for d, domain in enumerate(analysis.domains):
            axes.plot(analysis.layers, 100 * analysis.repeated(d)[which], label=domain, color=f"C{d}", marker=".")
        axes.axhline(100 * by_chance, color="gray", ls="--", lw=1, label=f"at random: {by_chance:.1%}")
        _labelled(axes, name, "% of pairs")
    return figure


def _information(analysis: Analysis, shown: Sequence[int]) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, keys in ((left, ("domain", "class", "token")), (right, ("class_given_domain", "domain_given_class"))):
        for i, key in enumerate(keys):
            bits = analysis.information[key]
            middle = np.array([each.corrected for each in bits])
            spread = np.array([2 * each.spread for each in bits])
            axes.plot(analysis.layers, middle, label=INFORMATION[key], color=f"C{i}", marker=".")
            axes.fill_between(analysis.layers, middle - spread, middle + spread, alpha=0.2, color=f"C{i}", lw=0)
        axes.axhline(0, color="gray", lw=1)
    left.plot(analysis.layers, analysis.choice_bits_L, label="all there is to tell", color="gray", ls="--")
    _labelled(left, "information of the first choice", "bits a token")
    _labelled(right, "by syntax or by topic", "bits a token")
    return figure


def _evenness(analysis: Analysis, shown: Sequence[int]) -> Figure:
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for d, domain in enumerate(analysis.domains):
        axes.plot(analysis.layers, analysis.evenness(d), label=domain, color=f"C{d}", marker=".")
    _labelled(axes, "entropy of the load / its largest value", "1: every expert has the same")
    return figure


def _load(analysis: Analysis, shown: Sequence[int]) -> Figure:
    total_LE = np.stack([counts.chosen_LE[list(analysis.layers)] for counts in analysis.counts]).sum(0)
    share_LE = total_LE / np.maximum(1, total_LE.sum(1, keepdims=True)) * analysis.n_experts
    figure = Figure(figsize=(7, 1.6 + min(6.0, 0.2 * len(analysis.layers))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_LE, aspect="auto", interpolation="nearest", vmin=0)
    _layer_ticks(axes, analysis)
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="load / mean load of the layer")
    return figure


def _together(analysis: Analysis, shown: Sequence[int]) -> Figure:
    figure = Figure(figsize=(3.7 * len(shown), 3.4), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False)
    for axes, layer in zip(grid[0], shown, strict=True):
        lift_EE = analysis.lift(layer)
        np.fill_diagonal(lift_EE, np.nan)
        image = axes.imshow(lift_EE, vmin=0, vmax=2, cmap="coolwarm", interpolation="nearest")
        axes.set_title(f"layer {analysis.layers[layer]}", fontsize=9)
    figure.colorbar(image, ax=grid, label="lift")
    return figure


def _layer_ticks(axes: Any, analysis: Analysis) -> None:
    step = max(1, len(analysis.layers) // 16)
    axes.set_yticks(range(0, len(analysis.layers), step), analysis.layers[::step])
    axes.set_ylabel("layer")


def _labelled(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend(fontsize=7)
