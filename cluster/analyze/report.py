"""The report of an analysis: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from cluster.analyze.analysis import INFORMATION, Analysis
from cluster.analyze.recording import Recording
from cluster.gateway.tokenizer import Tokenizer
from cluster.routing.counts import random_first, random_shared

_SHOWN_TOKENS = 400  # of each domain, coloured
_NOTES = {
    "Experts that are chosen together": "Lift: how many times as often two experts have a token together as their "
    "shares of the tokens alone would make it.",
    "What the first choice tells of a token": "Bands: two standard deviations of what shuffled labels show.",
}


def render(
    analysis: Analysis,
    recording: Recording,
    tokenizer: Tokenizer,
    shown: Sequence[int],
    charts: Mapping[str, Path],
) -> str:
    """The page. shown: places in `analysis.layers`. Text of the domains is in it, as far as tokens are coloured."""
    template = (files(__package__) / "report.html.jinja").read_text(encoding="utf-8")
    images = {title: base64.b64encode(path.read_bytes()).decode() for title, path in charts.items()}
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        analysis=analysis,
        information=INFORMATION,
        notes=_NOTES,
        images=images,
        shown=shown,
        colours=[_colour(expert, analysis.n_experts) for expert in range(analysis.n_experts)],
        repeated=[analysis.repeated(d) for d in range(len(analysis.domains))],
        by_chance=(random_first(analysis.n_experts), random_shared(analysis.n_experts, analysis.top_k)),
        coloured=[(analysis.layers[layer], _coloured(analysis.layers[layer], recording, tokenizer)) for layer in shown],
        mean_bits={
            key: sum(bits.corrected for bits in found) / len(found) for key, found in analysis.information.items()
        },
    )  # fmt: skip


def _coloured(layer: int, recording: Recording, tokenizer: Tokenizer) -> list[tuple[str, list[tuple[str, int]]]]:
    """By domain, the first tokens with the expert of their first choice (figure 8 of the paper)."""
    result = []
    for domain, name in enumerate(recording.domains):
        rows, _ = recording.span(domain)
        rows = slice(rows.start, min(rows.stop, rows.start + _SHOWN_TOKENS))
        text, starts = tokenizer.spell(recording.ids_N[rows].tolist())
        pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
        result.append((name, list(zip(pieces, recording.choices_NLK[rows, layer, 0].tolist(), strict=True))))
    return result


def _colour(expert: int, n_experts: int) -> str:
    """Hues all around the wheel; with many experts two lightnesses tell neighbours apart."""
    lightness = 78 if n_experts <= 12 or expert % 2 else 62
    return f"hsl({360 * expert / n_experts:.0f} 75% {lightness}%)"
