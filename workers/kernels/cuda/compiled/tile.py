"""What every product shares: which tile a program computes, and one step of its sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N: tl.constexpr, GROUP: tl.constexpr):
    """The row block and the column tile of a program, of M by N.

    Without GROUP all row blocks of a column tile follow each other, so that the L2 cache reads the weights once; with
    it GROUP row blocks at a time, so that their rows stay in the cache too.
    """
    if GROUP == 0:
        return pid % M, pid // M
    else:
        first = pid // (GROUP * N) * GROUP
        size = tl.minimum(M - first, GROUP)
        within = pid % (GROUP * N)
        return first + within % size, within // size


@triton.jit
def product(w, x, acc, SWAP: tl.constexpr):
    """acc += w @ x.T with SWAP (weights are the rows of the tensor core's tile), else x @ w.T."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc)
    else:
        return tl.dot(x, tl.trans(w), acc)
