"""What an answer says of tokens beside OpenAI's fields: ids and scores of the prompt, as vLLM writes them; experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.gateway.generation import Answer, Choice
from cluster.gateway.logprobs import TokenNames, finite
from cluster.gateway.schemas.sampling import SamplingFields
from cluster.gateway.sequence_text import Delta
from cluster.router.params import Routing, TokenLogprobs

Fields = dict[str, Any]


class TokenFields:
    """Those that `request` asks for: `return_token_ids`, `return_routing`, `prompt_logprobs`."""

    def __init__(self, names: TokenNames, request: SamplingFields) -> None:
        self._names = names
        self._ids = bool(request.return_token_ids)
        self._routing = bool(request.return_routing)
        self._scores = request.prompt_logprobs
        self._stop_ids = frozenset(request.stop_token_ids or ())

    @property
    def any(self) -> bool:
        """Whether chunks have fields of their own."""
        return self._ids or self._routing

    def opening(self, choice: Choice) -> Fields:
        """Of the first chunk of a choice."""
        return {"prompt_token_ids": choice.prompt_ids} if self._ids else {}

    def chunk(self, delta: Delta) -> Fields:
        """Of a chunk with more text."""
        fields: Fields = {"token_ids": list(delta.token_ids)} if self._ids else {}
        if self._routing and delta.routing is not None:
            fields["routing"] = _routing([delta.routing])
        return fields

    def whole(self, answer: Answer) -> Fields:
        """Of a whole choice."""
        fields: Fields = {
            "stop_reason": self.stop_reason(answer.choice),
            "token_ids": answer.token_ids if self._ids else None,
        }
        if self._routing:
            fields["routing"] = _routing(answer.routing)
        return fields

    def prompt(self, answer: Answer) -> Fields:
        """Of the prompt that `answer` answers."""
        scores, ids = answer.prompt_logprobs or (), answer.choice.prompt_ids
        return {
            "prompt_token_ids": ids if self._ids else None,
            "prompt_logprobs": None if self._scores is None else self._scored(ids, scores),
        }

    def stop_reason(self, choice: Choice) -> str | int | None:
        """The stop string, or the one of `stop_token_ids`, that ended a choice; null for the model's own end."""
        if choice.text.stop:
            return choice.text.stop
        return choice.text.stop_id if choice.text.stop_id in self._stop_ids else None

    def _scored(self, ids: Sequence[int], scored: Sequence[TokenLogprobs | None]) -> list[Fields | None]:
        """For each token of the prompt its score and those of the likeliest in its place, by id; none for the first."""
        return [
            None if entry is None else self._entry(token_id, entry)
            for token_id, entry in zip(ids, scored, strict=False)
        ]

    def _entry(self, token_id: int, entry: TokenLogprobs) -> Fields:
        ranked = {other: (logprob, rank) for rank, (other, logprob) in enumerate(entry.top, start=1)}
        known: dict[int, tuple[float, int | None]] = {token_id: (entry.logprob, None)} | dict(
            list(ranked.items())[: self._scores]
        )
        if token_id in ranked:
            known[token_id] = ranked[token_id]
        return {
            str(other): {"logprob": finite(logprob), "rank": rank, "decoded_token": self._names.name(other)}
            for other, (logprob, rank) in known.items()
        }


def _routing(parts: Sequence[Routing]) -> Fields:
    """By token from `start` on and layer, the experts, first choice first; none in a layer without experts."""
    experts = [
        [[expert for expert in experts_K if expert >= 0] for experts_K in experts_LK]
        for part in parts
        for experts_LK in part.experts_NLK.tolist()
    ]
    return {"start": parts[0].start if parts else 0, "experts": experts}
