"""Continuous batching: which tokens of which sequences the next step computes. No tensors here."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple

from cluster.errors import RequestError
from cluster.router.kv_blocks import KVBlocks
from cluster.router.sequence import Sequence, State
from cluster.router.shares import Shares, fair_seats


class Chunk(NamedTuple):
    """The next `n` pending tokens of `sequence`."""

    sequence: Sequence
    n: int

    @property
    def completes(self) -> bool:
        """Whether nothing is pending after it, so that its last row gives the next token."""
        return self.n == self.sequence.pending


_MAX_SCORED = 128  # prompt tokens scored in one step: the logits of each take some 200 KB


@dataclass(slots=True)
class _Room:
    """What is left of a step: token rows, and how many of them may be prompt tokens to score."""

    rows: int
    scored: int = _MAX_SCORED

    def chunk(self, sequence: Sequence) -> Chunk:
        """As much of the sequence as there is room for; possibly nothing."""
        n = min(sequence.pending, self.rows)
        if sequence.wants_prompt_logprobs:
            n = min(n, self.scored)
            self.scored -= n
        self.rows -= n
        return Chunk(sequence, n)


class Scheduler:
    """First come, first served among the requests of a tenant, within a budget of token rows a step.

    Of several tenants the one that holds least is next; one that is below its share while all is taken gets what the
    one that holds most has beyond its own. Sequences that decode go first, then prefills in order of admission, then
    admissions. A sequence gets the blocks for all its known tokens when it is admitted, so that only decoding can run
    out of blocks: then the sequence admitted last gives all of its back and waits, first in the queue, to be computed
    anew.
    """

    def __init__(
        self,
        blocks: KVBlocks,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_queue: int,
        shares_prefixes: bool = True,
        max_wait_s: float = math.inf,
    ) -> None:
        """`shares_prefixes`: what the cache holds of a newcomer's tokens is not computed again. `max_wait_s`: who waits
        longer for the first time to be admitted is overdue."""
        self.max_wait_s = max_wait_s
        self.blocks = blocks
        self._shares_prefixes = shares_prefixes
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = min(max_sequences, max_batch_tokens)  # each running sequence decodes in every step
        self.max_queue = max_queue
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0

    def submit(self, sequence: Sequence) -> None:
        """Queue it. Raises RequestError: queue_full when too many wait, context_length_exceeded when it never fits."""
        free_seats = self.max_sequences - len(self.running)  # those who arrive between two steps pass through the queue
        if len(self.waiting) >= self.max_queue + free_seats and not self._has_share(sequence.params.tenant):
            raise RequestError(
                f"{len(self.waiting)} requests are waiting already; try again later",
                code="queue_full", status=429, retry_after_s=1 + len(self.waiting) // self.max_sequences,
            )  # fmt: skip
        longest = sequence.n_prompt + max(sequence.params.max_tokens, 1) - 1  # the last token is never computed
        if self.blocks.needed(longest) > self.blocks.n_blocks:
            raise RequestError(
                f"prompt and answer need {longest} tokens of KV cache; this router has "
                f"{self.blocks.n_blocks * self.blocks.block_size}",
                code="context_length_exceeded", param="max_tokens",
            )  # fmt: skip
        # Behind those of the same priority; whoever was preempted is first in any case.
        place = len(self.waiting)
        while place and self.waiting[place - 1].params.priority > sequence.params.priority:
            place -= 1
        self.waiting.insert(place, sequence)

    def overdue(self) -> list[Sequence]:
        """Those who have waited too long, of whom nothing was computed yet, here or elsewhere."""
        latest = time.monotonic() - self.max_wait_s
        return [each for each in self.waiting if each.arrived < latest and not each.admitted_at and not each.n_emitted]

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, with blocks for all of them. Empty only when there is nothing to do."""
        room = _Room(self.max_batch_tokens)
        self._share_out()
        chunks = [room.chunk(sequence) for sequence in self._decode()]
        chunks += [room.chunk(sequence) for sequence in self.running if sequence.pending > 1]
        while room.rows and (newcomer := self._admit()):
            chunks.append(room.chunk(newcomer))
        return [chunk for chunk in chunks if chunk.n]

    def end(self, sequence: Sequence) -> None:
        """Complete or cancelled: its blocks are free at once. Harmless on an ended sequence."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.state is State.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state = State.ENDED

    def _decode(self) -> list[Sequence]:
        """The running sequences with one pending token, each with a block for it; preempts where there is none."""
        decoding: list[Sequence] = []
        for sequence in tuple(self.running):
            if sequence.state is not State.RUNNING or sequence.pending != 1 or sequence.awaits_its_end:
                continue
            if sequence.computed == len(sequence.blocks) * self.blocks.block_size:
                while not self.blocks.n_free and self.running[-1] is not sequence:
                    self._preempt(self.running[-1])
                if not self.blocks.n_free:
                    self._preempt(sequence)
                    break  # it was the last
                sequence.blocks.extend(self.blocks.allocate(1))
            decoding.append(sequence)
        return decoding

    def _admit(self) -> Sequence | None:
        """Move the head of the queue to the running ones, if there is room for it.

        One whose grammar is being compiled lets those behind it pass.
        """
        if not self.waiting or len(self.running) >= self.max_sequences:  # as in most steps
            return None
        if (sequence := self._next(self._shares())) is None:
            return None
        found = self._find(sequence)
        need = self.blocks.needed(len(sequence.tokens)) - len(found)
        # One spare block for each running sequence: else the newcomer would soon be preempted by their growth.
        if self.blocks.n_free < need + len(self.running):
            self.blocks.free(found)
            return None
        self.waiting.remove(sequence)
        sequence.blocks.extend(found + self.blocks.allocate(need))
        sequence.computed = len(found) * self.blocks.block_size
        if not sequence.n_emitted:
            sequence.cached = sequence.computed
        sequence.state = State.RUNNING
        sequence.admitted_at = sequence.admitted_at or time.monotonic()
        self.running.append(sequence)
        return sequence

    def _shares(self) -> Shares:
        return Shares(self.running, self.max_sequences, self.blocks.n_blocks)

    def _next(self, shares: Shares) -> Sequence | None:
        """Who of those that wait is to run next: the first that is ready of the tenant that holds least."""
        first: dict[str, Sequence] = {}
        for sequence in self.waiting:
            if sequence.params.tenant not in first and sequence.is_ready:
                first[sequence.params.tenant] = sequence
        return min(first.values(), key=lambda each: shares.of(each.params.tenant), default=None)

    def _share_out(self) -> None:
        """Preempt until who is next has room, as long as the others keep no less than its tenant then has."""
        if not self.waiting or not self.running:
            return
        if len({each.params.tenant for each in (*self.running, *self.waiting)}) < 2:
            return
        shares = self._shares()
        if (newcomer := self._next(shares)) is None:
            return
        need = self.blocks.needed(len(newcomer.tokens))
        wanted = shares.of(newcomer.params.tenant, 1, need)
        while len(self.running) >= self.max_sequences or self.blocks.n_free < need + len(self.running):
            shares = self._shares()
            richest = shares.greatest()
            last = next(each for each in reversed(self.running) if each.params.tenant == richest)
            if richest == newcomer.params.tenant or shares.of(richest, -1, -len(last.blocks)) < wanted:
                return
            self._preempt(last)

    def _has_share(self, tenant: str) -> bool:
        """Whether one more of `tenant` is within what is its own of the seats."""
        demands = Counter(each.params.tenant for each in (*self.running, *self.waiting))
        demands[tenant] += 1
        return len(demands) > 1 and fair_seats(demands, tenant, self.max_sequences) >= demands[tenant]

    def commit(self, sequence: Sequence, n: int) -> None:
        """`n` more of its tokens are in the cache; blocks that are full with them can be shared."""
        size = self.blocks.block_size
        first, sequence.computed = sequence.computed // size, sequence.computed + n
        if self._shares_prefixes and (full := sequence.computed // size) > first:
            for i, key in enumerate(sequence.keys(full, size)[first:], start=first):
                self.blocks.name(sequence.blocks[i], key)

    def _find(self, sequence: Sequence) -> list[int]:
        """The blocks in the cache that hold what the sequence begins with, all but its last token: that one's logits
        are wanted. None of a prompt that is to be scored: every row of it is. Nor tokens whose experts are wanted."""
        if not self._shares_prefixes or sequence.prompt_logprobs is not None:
            return []
        size = self.blocks.block_size
        last = sequence.routed if sequence.params.routing else len(sequence.tokens)
        return self.blocks.share(sequence.keys(min(last, len(sequence.tokens) - 1) // size, size))

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks of the last of the running back; it is computed anew when it is its turn again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.blocks)
        del sequence.blocks[:]
        sequence.computed = 0
