"""How often the gates choose which expert, and how often consecutive tokens are given to the same one.

Legend: L layers, E experts of a layer, T tokens, K experts a token. Layers without experts count nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Choices = NDArray[Any]  # integers: the experts of each token, first choice first


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """Sums over tokens. What they leave out is which token it was: no text can be had from them."""

    first_LE: Ints  # tokens whose first choice is the expert
    chosen_LE: Ints  # tokens that have the expert among their choices
    consecutive_L: Ints  # pairs of consecutive tokens of a sequence
    same_first_L: Ints  # of these, those with the same first choice
    shared_L: Ints  # those with an expert in common

    @classmethod
    def zeros(cls, n_layers: int, n_experts: int) -> Self:
        """Nothing counted yet."""
        table, column = (n_layers, n_experts), (n_layers,)
        return cls(*(np.zeros(shape, np.int64) for shape in (table, table, column, column, column)))

    @property
    def tokens(self) -> int:
        """Tokens counted, in the layer that saw most: in the last one prompts send only the rows that give logits."""
        return int(self.first_LE.sum(1).max(initial=0))

    def count(self, layer: int, q_start: tuple[int, ...] | None, ids_TK: Choices) -> None:
        """Add the choices of a layer. Rows q_start[s]:q_start[s + 1] are consecutive tokens; None: none are."""
        n_experts = self.first_LE.shape[1]
        self.first_LE[layer] += np.bincount(ids_TK[:, 0], minlength=n_experts)
        self.chosen_LE[layer] += np.bincount(ids_TK.ravel(), minlength=n_experts)
        if q_start is None or len(ids_TK) < 2:
            return
        follows_T = np.ones(len(ids_TK), bool)
        follows_T[list(q_start[:-1])] = False
        now_PK, before_PK = ids_TK[1:][follows_T[1:]], ids_TK[:-1][follows_T[1:]]
        self.consecutive_L[layer] += len(now_PK)
        self.same_first_L[layer] += np.count_nonzero(now_PK[:, 0] == before_PK[:, 0])
        self.shared_L[layer] += np.count_nonzero((now_PK[:, :, None] == before_PK[:, None, :]).any((1, 2)))

    def add(self, other: RoutingCounts) -> None:
        """The other's counts too."""
        for field in fields(self):
            getattr(self, field.name).__iadd__(getattr(other, field.name))

    def to_json(self) -> dict[str, Any]:
        """Lists by field."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        arrays = {field.name: np.array(value[field.name], np.int64) for field in fields(cls)}
        shape = arrays["first_LE"].shape
        if len(shape) != 2 or any(array.shape not in (shape, shape[:1]) for array in arrays.values()):
            raise ValueError("its tables do not fit each other")
        if min(array.min(initial=0) for array in arrays.values()) < 0:
            raise ValueError("a count is negative")
        return cls(**arrays)


def random_first(n_experts: int) -> float:
    """How often consecutive tokens would have the same first choice if tokens chose at random (arXiv 2401.04088,
    table 5): 12.5% with 8 experts."""
    return 1 / n_experts


def random_shared(n_experts: int, top_k: int) -> float:
    """How often they would have an expert in common: about 46% with 2 of 8."""
    apart = 1.0
    for i in range(top_k):
        apart *= max(0, n_experts - top_k - i) / (n_experts - i)
    return 1 - apart
