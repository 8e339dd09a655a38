"""What a client may ask of the sampling of one sequence, and what comes out of each step. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.errors import RequestError

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one sequence. Every field is checked at the gateway and again in the router (`limits`)."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0  # 64 bits; the gateway draws one when the client gives none, so that a fail-over continues alike
    stop_ids: tuple[int, ...] = ()  # besides the model's end-of-sequence ids
    ignore_eos: bool = False
    min_tokens: int = 0  # end-of-sequence and stop ids are not sampled before
    logprobs: int | None = None  # None: none; n: of the sampled token and of the n likeliest
    prompt_logprobs: int | None = None
    grammar: str = ""  # what the answer must follow (`router.grammar`); a complete answer ends, whatever `ignore_eos`
    bad_words: tuple[tuple[int, ...], ...] = ()  # no token is sampled that would complete one of these
    priority: int = 0  # of those who wait the lowest goes first
    tenant: str = ""  # whose request it is: seats and queue of a router are shared out between them
    cache_salt: str = ""  # KV blocks are shared by requests of the same salt alone
    allowed_ids: tuple[int, ...] = ()  # no other token is sampled; empty: all may be
    routing: bool = False  # whether to say which experts computed the answer's tokens
    origin: str = ""  # id of the HTTP request that it is a part of, for logs and traces
    traceparent: str = ""  # W3C trace context of that request; empty: it is not traced


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the distribution before temperature and filters) at one position."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The experts that tokens of an answer went through, N of them from its token `start` on (from 0).

    A token goes through the experts when the next one is computed, so its routing comes one output later, and the last
    token of an answer has none.
    """

    start: int
    experts_NLK: NDArray[np.int16]  # by layer, first choice first; -1: a layer without experts

    @property
    def end(self) -> int:
        """The first token of the answer after these."""
        return self.start + len(self.experts_NLK)

    def after(self, n_known: int) -> Routing | None:
        """What of it is about tokens from `n_known` on; None: nothing."""
        start = max(self.start, n_known)
        return Routing(start, self.experts_NLK[start - self.start :]) if start < self.end else None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gave one request."""

    request_id: str
    token_ids: tuple[int, ...]  # usually one; empty on the message that only ends a request
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # once, before the first token; first entry None
    finish: Finish | None = None
    error: RequestError | None = None  # with `finish` "error"
    cached_tokens: int = 0  # of the prompt, whose K and V were there already; with the first token
    routing: Routing | None = None  # if it is asked for
