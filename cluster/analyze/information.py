"""How much the choice of an expert tells of a token, in bits, beside what as many tokens would show by chance.

Legend: N tokens. A plug-in estimate of mutual information is too large, by about (cells - 1) / 2N ln 2; with labels
shuffled it is all error, so their mean is subtracted (Miller, "Note on the bias of information estimates", 1955, has
the same to first order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SHUFFLES = 10


@dataclass(frozen=True, slots=True)
class Bits:
    """Mutual information, bits a token."""

    plug_in: float  # from the counts as they are
    baseline: float  # the mean of that over labels that were shuffled
    spread: float  # its standard deviation

    @property
    def corrected(self) -> float:
        """What is left; around 0 where the two have nothing to do with each other."""
        return self.plug_in - self.baseline


def entropy(values_N: Ints) -> float:
    """Of how often each value occurs, in bits. Values are at least 0."""
    n = len(values_N)
    if n == 0:
        return 0.0
    few = int(values_N.max()) < 8 * n
    counts = np.bincount(values_N) if few else np.unique(values_N, return_counts=True)[1]
    share = counts[counts > 0] / n
    return float(-(share * np.log2(share)).sum())


def joint(a_N: Ints, b_N: Ints) -> Ints:
    """One value for each pair of values."""
    return a_N * (int(b_N.max(initial=0)) + 1) + b_N


def mutual_information(a_N: Ints, b_N: Ints, given_N: Ints | None = None) -> float:
    """I(A; B), or I(A; B | given), in bits, from the counts as they are."""
    if given_N is None:
        return entropy(a_N) + entropy(b_N) - entropy(joint(a_N, b_N))
    both_N = joint(b_N, given_N)
    return entropy(joint(a_N, given_N)) + entropy(both_N) - entropy(joint(a_N, both_N)) - entropy(given_N)


def shuffled(label_N: Ints, given_N: Ints | None, rng: np.random.Generator) -> Ints:
    """The labels in another order; only among tokens with the same `given`, where it is given."""
    if given_N is None:
        return rng.permutation(label_N)
    among_N = np.lexsort((rng.random(len(label_N)), given_N))
    result_N = np.empty_like(label_N)
    result_N[np.argsort(given_N, kind="stable")] = label_N[among_N]
    return result_N


def estimate(experts_LN: Sequence[Ints], label_N: Ints, given_N: Ints | None = None, seed: int = 0) -> list[Bits]:
    """Of the experts of each layer, with the labels (and given others); the same shuffles for all layers."""
    rng = np.random.default_rng(seed)
    shuffles = [shuffled(label_N, given_N, rng) for _ in range(SHUFFLES)]
    found = []
    for expert_N in experts_LN:
        chance = [mutual_information(expert_N, each_N, given_N) for each_N in shuffles]
        plug_in = mutual_information(expert_N, label_N, given_N)
        found.append(Bits(plug_in, float(np.mean(chance)), float(np.std(chance))))
    return found
