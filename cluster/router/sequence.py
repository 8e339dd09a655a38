"""One generation in progress. No tensors here."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as Items
from enum import Enum
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from cluster.router.grammar import Grammar
from cluster.router.params import Finish, Routing, SamplingParams, TokenLogprobs
from cluster.router.sampling_state import SamplingState


class State(Enum):
    WAITING = "waiting"  # not admitted yet, or preempted
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """Prompt and emitted tokens of one request, and how far the KV cache has got with them.

    A sequence that another router began starts with its emitted tokens: they are computed with the prompt, count
    against `max_tokens`, and sampling goes on at the position after them.
    """

    __slots__ = (
        "admitted_at",
        "ahead",
        "arrived",
        "block_keys",
        "blocks",
        "cached",
        "computed",
        "first_token_at",
        "n_prompt",
        "params",
        "prompt_logprobs",
        "request_id",
        "routed",
        "routing",
        "sampling",
        "state",
        "stops",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_ids: Items[int],
        params: SamplingParams,
        *,
        eos_ids: Items[int] = (),
        emitted_ids: Items[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.n_prompt = len(prompt_ids)
        self.tokens = [*prompt_ids, *emitted_ids]
        goes_on = params.ignore_eos and grammar is None  # after a grammar's end nothing else may come
        self.stops = frozenset(params.stop_ids if goes_on else (*params.stop_ids, *eos_ids))
        self.sampling = SamplingState(params, prompt_ids, emitted_ids, grammar)
        self.computed = 0  # tokens whose K and V are in the cache, or will be once the steps under way are complete
        self.ahead = -1  # which draw of the step under way is its next token; -1: every token is known here
        self.cached = 0  # of the prompt's tokens those that were there when it was admitted first
        self.blocks = array("i")
        self.block_keys: list[bytes] = []  # of its first blocks, each a function of all tokens up to its end
        self.state = State.WAITING
        self.arrived = time.monotonic()
        self.admitted_at = 0.0  # the first time, even if it was preempted since; 0: not yet
        self.first_token_at = 0.0  # of this router's
        # By position; grows as the prompt is computed. None: not wanted, or sent already, be it by another router.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None and not emitted_ids:
            self.prompt_logprobs = [None]
        self.routed = self.n_prompt  # tokens whose experts are known, or not asked for
        self.routing: list[NDArray[np.int16]] = []  # [n, L, K], those that were not told yet

    @property
    def n_emitted(self) -> int:
        return len(self.tokens) - self.n_prompt

    def ends_with(self, ids: Items[int]) -> bool:
        """Whether the answer so far ends with `ids`."""
        n = len(ids)
        return n == 0 or (n <= self.n_emitted and tuple(self.tokens[-n:]) == tuple(ids))

    @property
    def n_known(self) -> int:
        """Tokens that there are, that of a step under way included."""
        return len(self.tokens) + (self.ahead >= 0)

    @property
    def pending(self) -> int:
        """Tokens that there are but not in the cache: 1 while it decodes, more while it prefills."""
        return self.n_known - self.computed

    @property
    def awaits_its_end(self) -> bool:
        """Whether the token of the step under way is its last, whatever it is."""
        return self.ahead >= 0 and self.n_known - self.n_prompt >= self.params.max_tokens

    @property
    def is_free(self) -> bool:
        """Whether its next token but one can be computed before its next one is known to the host."""
        needed = self.sampling.seen is not None or self.sampling.grammar is not None or self.params.bad_words
        return not (needed or self.wants_prompt_logprobs)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt tokens are still to be scored."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.n_prompt

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """The scores of the prompt, once they are complete, and only once."""
        if self.prompt_logprobs is None or self.wants_prompt_logprobs:
            return None
        scores, self.prompt_logprobs = tuple(self.prompt_logprobs), None
        return scores

    def note_routing(self, position: int, experts_NLK: NDArray[np.int16]) -> None:
        """The experts of its tokens from `position` on; those that are known already are skipped."""
        fresh_NLK = experts_NLK[max(0, self.routed - position) :]
        if len(fresh_NLK):
            self.routing.append(fresh_NLK)
            self.routed += len(fresh_NLK)

    def take_routing(self) -> Routing | None:
        """What became known since the last time."""
        if not self.routing:
            return None
        experts_NLK, self.routing = np.concatenate(self.routing), []
        return Routing(self.routed - len(experts_NLK) - self.n_prompt, experts_NLK)

    def keys(self, n: int, block_size: int) -> list[bytes]:
        """The keys of its first `n` blocks, which its tokens fill: a chain of SHA-256 over the tokens, block by block,
        that begins with the request's salt."""
        for i in range(len(self.block_keys), n):
            before = self.block_keys[-1] if i else sha256(self.params.cache_salt.encode()).digest()
            tokens = array("q", self.tokens[i * block_size : (i + 1) * block_size])
            self.block_keys.append(sha256(before + tokens.tobytes()).digest())
        return self.block_keys[:n]

    @property
    def is_ready(self) -> bool:
        """Whether it can be admitted: its tokens are known, and its grammar, if it has one, is compiled."""
        if self.ahead >= 0:
            return False
        return self.sampling.grammar is None or self.sampling.grammar.wait(0)

    @property
    def bans_stops(self) -> bool:
        """Whether the next token must not end the sequence."""
        return self.n_known - self.n_prompt < self.params.min_tokens

    def append(self, token: int) -> None:
        """One more emitted token."""
        self.tokens.append(token)
        self.ahead = -1
        if self.sampling.seen is not None:
            self.sampling.seen.add(token)
        if self.sampling.grammar is not None:
            self.sampling.grammar.append(token)

    def finish(self) -> Finish | None:
        """Why the sequence is complete with the tokens it has; None while it is not."""
        n_emitted = self.n_emitted
        if n_emitted and self.tokens[-1] in self.stops and n_emitted > self.params.min_tokens:
            return "stop"
        return "length" if n_emitted >= self.params.max_tokens else None
