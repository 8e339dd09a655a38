"""What may come next in every sequence of a step, by its lists and its grammar.

A grammar's mask follows from the tokens that a step computes with, and is needed when the step is complete. So it is
computed beside the forward pass, in a thread of its own: llguidance works without the GIL.

Shape legend: N sequences with a grammar, V vocabulary, W = ceil(V / 32) words of a mask, bit t of which is token t;
I listed tokens; K words that have one.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from cluster.errors import RequestError
from cluster.router.grammar import Grammar
from cluster.router.sequence import Sequence
from cluster.router.token_mask import TokenMask

Words = NDArray[np.uint32]
_ALL = np.uint32(0xFFFFFFFF)


class TokenMasks:
    """Begins the masks of one step after another. Owns scratch memory and a thread, so one per step loop."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._words_NW: Words = np.zeros((0, -(-vocab_size // 32)), np.uint32)
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token masks")

    def begin(self, sequences: Items[Sequence]) -> Begun:
        """The masks of a step over `sequences`, to which nothing may be appended before they are complete."""
        grammars = [grammar for each in sequences if (grammar := each.sampling.grammar) is not None]
        return Begun(sequences, self._thread.submit(self._allowed, grammars) if grammars else None)

    def _allowed(self, grammars: Items[Grammar]) -> list[TokenMask | RequestError]:
        """What each grammar allows, or why it cannot be followed."""
        given: list[TokenMask | RequestError | None] = []
        matchers = []
        for grammar in grammars:
            try:
                grammar.check()
                matchers.append(grammar.matcher)
                given.append(None)
            except RequestError as error:
                given.append(error)
        if len(matchers) > len(self._words_NW):
            self._words_NW = np.zeros((len(matchers), self._words_NW.shape[1]), np.uint32)
        words_NW = self._words_NW[: len(matchers)]
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0], words_NW.view(np.int32))
        elif matchers:
            self._executor = self._executor or LLExecutor()
            rows = [(matcher, i) for i, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, rows, words_NW.view(np.int32))
        masks = iter(listed(words_NW, self._vocab_size))
        return [next(masks) if each is None else each for each in given]


class Begun:
    """Masks on their way."""

    def __init__(self, sequences: Items[Sequence], followed: Future[list[TokenMask | RequestError]] | None) -> None:
        self._sequences = sequences
        self._followed = followed

    def result(self) -> list[TokenMask | RequestError | None]:
        """For each sequence what may come next, or why nothing may; None: any token. Waits for what is not complete."""
        followed = iter(() if self._followed is None else self._followed.result())
        return [
            None if each.sampling.plain else _next(each, next(followed) if each.sampling.grammar is not None else None)
            for each in self._sequences
        ]


def _next(sequence: Sequence, mask: TokenMask | RequestError | None) -> TokenMask | RequestError | None:
    """What may come next, where the grammar says `mask`."""
    if isinstance(mask, RequestError):
        return mask
    listed = sequence.sampling.allowed
    if listed is not None:
        mask = listed if mask is None else mask & listed
    if bad := [word[-1] for word in sequence.params.bad_words if sequence.ends_with(word[:-1])]:
        mask = TokenMask.all_but(bad) if mask is None else mask & TokenMask.all_but(bad)
    if mask is not None and mask.is_empty:
        code = "invalid_value" if sequence.sampling.grammar is None else "invalid_grammar"
        return RequestError("grammar, allowed_token_ids and bad_words together allow no token", code=code)
    if sequence.bans_stops and sequence.stops:
        going_on = TokenMask.all_but(sequence.stops) if mask is None else mask & TokenMask.all_but(sequence.stops)
        mask = mask if going_on.is_empty else going_on  # a grammar at its end has nothing but these
    return mask


def listed(words_NW: Words, vocab_size: int) -> list[TokenMask]:
    """The masks of packed bits, which it changes."""
    last = _ALL >> np.uint32(-vocab_size % 32)
    words_NW[:, -1] &= last
    counts_N = np.bitwise_count(words_NW).sum(axis=1, dtype=np.int32)
    allows_N = 2 * counts_N <= vocab_size
    if not allows_N.all():
        words_NW[~allows_N] ^= _ALL
        words_NW[:, -1] &= last
    word_K = np.flatnonzero(words_NW != 0)  # five times as fast as of the words themselves
    bits = np.unpackbits(words_NW.reshape(-1)[word_K].view(np.uint8), bitorder="little")
    bit_I = np.flatnonzero(bits.view(np.bool_))
    ids_I = 32 * (word_K % words_NW.shape[1])[bit_I >> 5] + (bit_I & 31)
    ends_N = np.cumsum(np.where(allows_N, counts_N, vocab_size - counts_N)).tolist()
    return [
        TokenMask(ids_I[begin:end], allows)
        for begin, end, allows in zip([0, *ends_N[:-1]], ends_N, allows_N.tolist(), strict=True)
    ]
