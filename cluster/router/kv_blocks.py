"""Who owns which block of the KV pool. No tensors here: the pool itself is `workers.model.kv_cache`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = bytes


class KVBlocks:
    """A bounded pool of `n_blocks` blocks of `block_size` tokens, some of which are known by what they hold.

    A block with a key is full and not written any more, so several sequences may share it. When its last owner gives it
    back it stays findable until its place is needed: the one not used for longest leaves first.
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: the block freed last is warm in the cache
        self._owners = [0] * n_blocks
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # with a key and without an owner, oldest first

    @property
    def n_free(self) -> int:
        """Blocks that can be had: nobody owns them."""
        return len(self._free) + len(self._idle)

    def needed(self, n_tokens: int) -> int:
        """How many blocks hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks. Asking for more than `n_free` is the caller's error: MemoryError, and nothing is taken."""
        if n > self.n_free:
            raise MemoryError(f"{n} KV blocks wanted, {self.n_free} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back. A block that nobody owns would later belong to two sequences: ValueError."""
        for block in reversed(blocks):  # the end of a sequence is found again less often than its beginning
            if not self._owners[block]:
                raise ValueError(f"KV block {block} is free already")
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def share(self, keys: Iterable[Key]) -> list[int]:
        """Take the blocks of the first of `keys`, up to the first that no block has."""
        blocks: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._idle.pop(block, None)
            self._owners[block] += 1
            blocks.append(block)
        return blocks

    def name(self, block: int, key: Key) -> None:
        """`block`, which has an owner, is full: find it by `key` from now on. The first block of a key stays it."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Find `blocks`, which have an owner, by no key any more."""
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
