"""Which tokens may come next.

Shape legend: V vocabulary, I listed tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenMask(NamedTuple):
    """A few tokens, or all but a few: a list of either costs a sampler far less than a flag for every token."""

    ids_I: NDArray[np.int64]  # ascending
    allows: bool  # whether these may come next; False: all others

    @staticmethod
    def only(ids: Collection[int]) -> TokenMask:
        return TokenMask(_sorted(ids), True)

    @staticmethod
    def all_but(ids: Collection[int]) -> TokenMask:
        return TokenMask(_sorted(ids), False)

    @property
    def is_empty(self) -> bool:
        """Whether no token may come next."""
        return self.allows and not len(self.ids_I)

    def __and__(self, other: object) -> TokenMask:
        """What both allow."""
        if not isinstance(other, TokenMask):
            return NotImplemented
        if self.allows and other.allows:
            return TokenMask(np.intersect1d(self.ids_I, other.ids_I, assume_unique=True), True)
        if self.allows:
            return TokenMask(np.setdiff1d(self.ids_I, other.ids_I, assume_unique=True), True)
        return other & self if other.allows else TokenMask(np.union1d(self.ids_I, other.ids_I), False)


def _sorted(ids: Collection[int]) -> NDArray[np.int64]:
    return np.unique(np.fromiter(ids, np.int64, len(ids)))
