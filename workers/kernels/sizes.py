"""The sizes for which something is prepared: compiled, or captured."""

from __future__ import annotations


def powers_up_to(most: int) -> list[int]:
    """Powers of two up to `most`, and that."""
    return [*(1 << n for n in range(most.bit_length()) if 1 << n < most), most]
