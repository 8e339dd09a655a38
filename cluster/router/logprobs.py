"""Log-probabilities of the raw distribution: before penalties, temperature and filters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.router.params import TokenLogprobs


def token_logprobs(logits_V: NDArray[np.float32], token: int, n_top: int) -> TokenLogprobs:
    """Of `token`, and the `n_top` likeliest (ties: the lower id first). Summed in float64."""
    largest = logits_V.max()
    log_sum = float(largest) + float(np.log(np.exp(logits_V - largest).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if n_top:
        n_rest = max(len(logits_V) - n_top, 0)
        ids = np.flatnonzero(logits_V >= np.partition(logits_V, n_rest)[n_rest])
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:n_top]
        top = tuple((int(i), float(logits_V[i]) - log_sum) for i in ids)
    return TokenLogprobs(float(logits_V[token]) - log_sum, top)
