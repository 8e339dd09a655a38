"""From choices to figures: what the charts, the report and analysis.json show.

Legend: N tokens, L layers that have experts, K experts a token, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.analyze.information import Bits, entropy, estimate
from cluster.analyze.recording import Recording
from cluster.routing.counts import Choices, RoutingCounts, random_first, random_shared

Floats = NDArray[np.float64]

INFORMATION = {
    "domain": "domain",
    "class": "token class",
    "token": "the token itself",
    "class_given_domain": "token class, within a domain",
    "domain_given_class": "domain, within a token class",
}


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything, for all layers that have experts."""

    model: str
    n_experts: int
    top_k: int
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    counts: tuple[RoutingCounts, ...]  # by domain, over all layers of the model
    rank_DLKE: NDArray[np.int64]  # by domain: tokens whose choice K, from the first, is the expert
    together_LEE: NDArray[np.int64]  # tokens that have both experts
    weight_L: Floats  # mean weight of the first choice, of the sum over its choices
    choice_bits_L: Floats  # entropy of the first choice
    information: dict[str, list[Bits]]  # by the keys of INFORMATION, by layer

    def share(self, domain: int, layer: int) -> Floats:
        """Part of the domain's tokens whose first, second, ... choice is the expert, [K, E]; of a place in `layers`."""
        rank_KE = self.rank_DLKE[domain, layer]
        share_KE: Floats = rank_KE / max(1, int(rank_KE[0].sum()))
        return share_KE

    def repeated(self, domain: int) -> tuple[Floats, Floats]:
        """By layer, how often consecutive tokens have the same first choice, and an expert in common."""
        counts, layers = self.counts[domain], list(self.layers)
        pairs_L = np.maximum(1, counts.consecutive_L[layers])
        return counts.same_first_L[layers] / pairs_L, counts.shared_L[layers] / pairs_L

    def evenness(self, domain: int) -> Floats:
        """By layer, the entropy of the shares of all choices by its largest value: 1 where all experts get the same."""
        return np.array([_evenness(self.counts[domain].chosen_LE[layer]) for layer in self.layers])

    def lift(self, layer: int) -> Floats:
        """How much more often two experts have a token together than their shares alone would make it, [E, E]; 1 is as
        often. 0 where either has none."""
        together_EE = self.together_LEE[layer].astype(float)
        alone_E = together_EE.sum(0)
        expected_EE = np.outer(alone_E, alone_E)
        np.fill_diagonal(expected_EE, 0)
        expected_EE *= together_EE.sum() / max(expected_EE.sum(), 1e-300)
        lift_EE: Floats = np.divide(together_EE, expected_EE, out=np.zeros_like(together_EE), where=expected_EE > 0)
        return lift_EE

    @property
    def syntax_share(self) -> float | None:
        """Of what token class and domain tell of the first choice, each within the other, the part of the class: near 1
        where experts go by syntax, near 0 where by topic. None where neither tells anything, or with one domain."""
        if len(self.domains) < 2:
            return None
        syntax, topic = (
            sum(max(0.0, bits.corrected - 2 * bits.spread) for bits in self.information[key])
            for key in ("class_given_domain", "domain_given_class")
        )
        return syntax / (syntax + topic) if syntax + topic > 0 else None

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        repeated = [self.repeated(d) for d in range(len(self.domains))]
        even = [self.evenness(d) for d in range(len(self.domains))]
        return {
            "model": self.model,
            "experts": self.n_experts,
            "top_k": self.top_k,
            "tokens": dict(zip(self.domains, (counts.tokens for counts in self.counts), strict=True)),
            "random": {
                "same_first": random_first(self.n_experts), "shared": random_shared(self.n_experts, self.top_k)
            },
            "syntax_share": self.syntax_share,
            "layers": [
                {
                    "layer": layer,
                    "first_choice_weight": float(self.weight_L[i]),
                    "first_choice_entropy_bits": float(self.choice_bits_L[i]),
                    "information_bits": {
                        key: asdict(bits[i]) | {"corrected": bits[i].corrected}
                        for key, bits in self.information.items()
                    },
                    "domains": {
                        name: {
                            "share_by_choice": self.share(d, i).round(6).tolist(),
                            "same_first": float(repeated[d][0][i]),
                            "shared": float(repeated[d][1][i]),
                            "evenness": float(even[d][i]),
                        }
                        for d, name in enumerate(self.domains)
                    },
                }
                for i, layer in enumerate(self.layers)
            ],
        }  # fmt: skip


def analyse(model: str, n_experts: int, layers: Sequence[int], recording: Recording) -> Analysis:
    """All figures of a recording, for the `layers` that have experts."""
    top_k = recording.choices_NLK.shape[2]
    counts, ranks = [], []
    for domain in range(len(recording.domains)):
        rows, q_start = recording.span(domain)
        made = RoutingCounts.zeros(recording.choices_NLK.shape[1], n_experts)
        for layer in layers:
            made.count(layer, q_start, recording.choices_NLK[rows, layer])
        counts.append(made)
        ranks.append([_ranked(recording.choices_NLK[rows, layer], n_experts) for layer in layers])
    first_LN = [recording.choices_NLK[:, layer, 0].astype(np.int64) for layer in layers]
    by_domain, by_class, by_token = recording.domain_N, recording.class_N, recording.ids_N
    information = {
        "domain": estimate(first_LN, by_domain),
        "class": estimate(first_LN, by_class),
        "token": estimate(first_LN, by_token),
        "class_given_domain": estimate(first_LN, by_class, by_domain),
        "domain_given_class": estimate(first_LN, by_domain, by_class),
    }
    return Analysis(
        model, n_experts, top_k, tuple(layers), recording.domains, tuple(counts), np.array(ranks),
        np.stack([_together(recording.choices_NLK[:, layer], n_experts) for layer in layers]),
        recording.weight_L[list(layers)], np.array([entropy(first_N) for first_N in first_LN]), information,
    )  # fmt: skip


def _ranked(ids_NK: Choices, n_experts: int) -> NDArray[np.int64]:
    return np.stack([np.bincount(ids_N, minlength=n_experts) for ids_N in ids_NK.T])


def _together(ids_NK: Choices, n_experts: int) -> NDArray[np.int64]:
    """Symmetric, with nothing on the diagonal."""
    wide_NK = ids_NK.astype(np.int64)
    together_EE = np.zeros((n_experts, n_experts), np.int64)
    for i in range(wide_NK.shape[1]):
        for j in range(wide_NK.shape[1]):
            if i != j:
                pairs = np.bincount(wide_NK[:, i] * n_experts + wide_NK[:, j], minlength=n_experts**2)
                together_EE += pairs.reshape(n_experts, n_experts)
    return together_EE


def _evenness(loads_E: NDArray[np.int64]) -> float:
    share = loads_E[loads_E > 0] / max(1, int(loads_E.sum()))
    return float(-(share * np.log2(share)).sum() / np.log2(len(loads_E))) if len(loads_E) > 1 else 1.0
