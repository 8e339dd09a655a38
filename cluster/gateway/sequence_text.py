"""One sequence as text: tokens in, what may be shown out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.gateway.detokenizer import Detokenizer
from cluster.gateway.parsers.parts import Part
from cluster.gateway.stops import StopFinder
from cluster.router.params import Routing, StepOutput, TokenLogprobs

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probabilities, and where its text begins in the text of the sequence."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Delta:
    """What one output adds. `scored` are the tokens whose text is complete with it, if they were asked for."""

    text: str
    scored: list[ScoredToken] = field(default_factory=list)
    finish: FinishReason | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    token_ids: tuple[int, ...] = ()
    routing: Routing | None = None  # of tokens before these
    parts: list[Part] = field(default_factory=list)  # of `text`, where function calls or reasoning are looked for


class SequenceText:
    """Detokenises one sequence, ends it at a stop string, and keeps log-probabilities in step with the text.

    Text of the first `min_tokens` tokens is not searched for stop strings. A token that ends the sequence has no
    text. `n_tokens` counts every token, shown or not. `shows_stop`: the stop string is part of the text.
    """

    __slots__ = (
        "_detokenizer",
        "_finder",
        "_min_tokens",
        "_scored",
        "_seen",
        "_shown",
        "_shows_stop",
        "n_tokens",
        "stop_id",
    )

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), min_tokens: int = 0, *, shows_stop: bool = False
    ):
        self._shows_stop = shows_stop
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops) if stops else None
        self._min_tokens = min_tokens
        self._seen = self._shown = 0  # characters: detokenised, and let through
        self._scored: list[ScoredToken] = []  # tokens whose text is still held back
        self.n_tokens = 0
        self.stop_id: int | None = None  # the token that ended the sequence, if one did

    @property
    def stop(self) -> str:
        """The stop string that ended the text; "" while none did."""
        return "" if self._finder is None else self._finder.matched

    def feed(self, output: StepOutput) -> Delta:
        """The text that `output` lets through. After a delta with `finish`, feed no more."""
        ids = output.token_ids
        if output.finish == "stop" and ids:
            self.stop_id, ids = ids[-1], ids[:-1]
        text = ""
        for i, token_id in enumerate(ids):
            text += self._push(token_id, output.logprobs[i] if output.logprobs else None)
            if self._finder is not None and self._finder.matched:
                return self._delta(text, output, "stop")
        self.n_tokens += len(output.token_ids) - len(ids)
        if output.finish is None:
            return self._delta(text, output, None)
        text += self._flush()
        if self._finder is not None and self._finder.matched:
            return self._delta(text, output, "stop")
        return self._delta(text, output, "stop" if output.finish == "stop" else "length")

    def _push(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        text = self._detokenizer.push(token_id)
        self.n_tokens += 1
        if logprobs is not None:
            self._scored.append(ScoredToken(token_id, logprobs, self._seen))
        self._seen += len(text)
        return self._search(text)

    def _flush(self) -> str:
        text = self._search(self._detokenizer.flush())
        if self._finder is not None and not self._finder.matched:
            text += self._finder.flush()
        return text

    def _search(self, text: str) -> str:
        if self._finder is None or self.n_tokens <= self._min_tokens:
            return text
        text = self._finder.push(text)
        return text + self._finder.matched if self._shows_stop and self._finder.matched else text

    def _delta(self, text: str, output: StepOutput, finish: FinishReason | None) -> Delta:
        self._shown += len(text)
        scored: list[ScoredToken] = []
        if self._scored:
            if finish is None:  # a token goes out with the last character before the next one's
                limits = [token.offset for token in self._scored[1:]] + [self._seen]
                n_complete = sum(limit <= self._shown for limit in limits)
            else:
                n_complete = sum(token.offset < self._shown or token.offset == self._seen for token in self._scored)
            scored, self._scored = self._scored[:n_complete], self._scored[n_complete:]
        return Delta(text, scored, finish, output.prompt_logprobs)
