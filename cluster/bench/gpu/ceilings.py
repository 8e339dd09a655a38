"""What a card gives at most: bytes a second of its memory, operations a second of its matrix units."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.bench.gpu.timing import median_us


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on this card. What reads alone can beat the copy, so a fraction of it can exceed 1."""

    copy: float  # bytes a second, read plus written
    bf16: float  # operations a second of a product of 8192 x 8192 random bfloat16 numbers

    @classmethod
    def measure(cls) -> Ceilings:
        """The best of three medians each."""
        a = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_(0, 255)
        b = torch.empty_like(a)
        copy_us = min(median_us(lambda: b.copy_(a)) for _ in range(3))
        n_bytes = 2 * a.nbytes
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product_us = min(median_us(lambda: x @ y) for _ in range(3))
        torch.cuda.empty_cache()
        return cls(n_bytes / copy_us * 1e6, 2 * 8192**3 / product_us * 1e6)
