"""Triton sources. Sums in float32, no atomics, no split of a sum: a row's bits depend on its own inputs alone."""
