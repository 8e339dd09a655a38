"""Who owns which block of the KV pool. No tensors here: the pool itself is `workers.model.kv_cache`."""

from __future__ import annotations

from collections.abc import Iterable


class KVBlocks:
    """A bounded pool of `n_blocks` blocks of `block_size` tokens."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: the block freed last is warm in the cache
        self._taken = bytearray(n_blocks)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def needed(self, n_tokens: int) -> int:
        """How many blocks hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks. Asking for more than `n_free` is the caller's error: MemoryError, and nothing is taken."""
        if n > len(self._free):
            raise MemoryError(f"{n} KV blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(n)]
        for block in blocks:
            self._taken[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. A block that is not taken would later belong to two sequences: ValueError."""
        for block in blocks:
            if not self._taken[block]:
                raise ValueError(f"KV block {block} is free already")
            self._taken[block] = 0
            self._free.append(block)
