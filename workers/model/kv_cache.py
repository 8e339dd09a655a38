"""The paged pool of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.spec import ModelSpec


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block of `block_size` tokens takes over all layers, keys and values."""
    return 2 * spec.n_layers * block_size * spec.n_kv_heads * spec.head_dim * dtype.itemsize


class KVCache:
    """`k[layer]` and `v[layer]`: [n_blocks, block_size, n_kv_heads, head_dim].

    Which block belongs to which sequence is the router's business; here is only the memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (spec.n_layers, n_blocks, block_size, spec.n_kv_heads, spec.head_dim)
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.dtype = dtype
        # One allocation per kind; on a CPU the operating system hands out its pages as they are written.
        self.k = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self.v = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self.device = self.k[0].device

    def read(self, layer: int, blocks_B: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the blocks, one after the other: [B * block_size, n_kv_heads, head_dim] each."""
        # index_select copies whole blocks; indexing by brackets takes 1.7 times as long on a CPU.
        k_BSGd, v_BSGd = self.k[layer].index_select(0, blocks_B), self.v[layer].index_select(0, blocks_B)
        return k_BSGd.flatten(0, 1), v_BSGd.flatten(0, 1)
