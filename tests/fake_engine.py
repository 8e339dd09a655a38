"""A deterministic engine without a model: a token is a function of (prompt, seed, position), as with real sampling."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.errors import RequestError
from cluster.router.params import SamplingParams, StepOutput, TokenLogprobs


def token_at(prompt_ids: Sequence[int], seed: int, position: int) -> int:
    return hash((tuple(prompt_ids), seed, position)) % 32000


def expected(prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
    """The tokens of an undisturbed run."""
    return [token_at(prompt_ids, params.seed, position) for position in range(params.max_tokens)]


@dataclass
class _Sequence:
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    position: int
    prompt_logprobs_due: bool


@dataclass(frozen=True)
class FakeStats:
    running: int
    steps: int
    connected: list[str]


@dataclass
class FakeEngine:
    """One token per open sequence and step, `step_s` apart; everything it was asked is on record."""

    step_s: float = 0.0
    max_queue: int = 1_000_000
    sequences: dict[str, _Sequence] = field(default_factory=dict)
    submitted: list[tuple[tuple[int, ...], SamplingParams, tuple[int, ...]]] = field(default_factory=list)
    cancelled: int = 0
    steps: int = 0
    fail_next_step: bool = False
    gate: threading.Event = field(default_factory=threading.Event)  # steps wait until it is set
    lock: threading.Lock = field(default_factory=threading.Lock)  # over `sequences`

    def __post_init__(self) -> None:
        self.gate.set()

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, emitted_ids: Sequence[int] = ()
    ) -> None:
        if len(self.sequences) >= self.max_queue:
            raise RequestError("too many requests", code="queue_full", status=429, retry_after_s=3)
        if len(prompt_ids) > 1000:
            raise RequestError("too long", code="context_length_exceeded", param="prompt")
        self.submitted.append((tuple(prompt_ids), params, tuple(emitted_ids)))
        sequence = _Sequence(tuple(prompt_ids), params, len(emitted_ids), params.prompt_logprobs is not None)
        self.sequences[request_id] = sequence

    def cancel(self, request_id: str) -> None:
        with self.lock:
            self.cancelled += self.sequences.pop(request_id, None) is not None

    def has_work(self) -> bool:
        return bool(self.sequences)

    def step(self) -> list[StepOutput]:
        self.gate.wait()
        if self.step_s:
            time.sleep(self.step_s)
        if self.fail_next_step:
            self.fail_next_step = False
            with self.lock:
                failed, self.sequences = list(self.sequences), {}
            return [
                StepOutput(
                    request_id,
                    (),
                    finish="error",
                    error=RequestError("the engine broke", code="internal_error", status=500),
                )
                for request_id in failed
            ]
        self.steps += 1
        with self.lock:
            return [self._advance(request_id) for request_id in list(self.sequences)]

    def stats(self) -> object:
        return FakeStats(len(self.sequences), self.steps, ["expert-0"])

    def _advance(self, request_id: str) -> StepOutput:
        sequence = self.sequences[request_id]
        token = token_at(sequence.prompt_ids, sequence.params.seed, sequence.position)
        prompt_logprobs = None
        if sequence.prompt_logprobs_due:
            sequence.prompt_logprobs_due = False
            prompt_logprobs = (None, *(TokenLogprobs(-float(id)) for id in sequence.prompt_ids[1:]))
        logprobs = ()
        if sequence.params.logprobs is not None:
            logprobs = (TokenLogprobs(-0.5, ((token, -0.5), (1, -1.5))),)
        sequence.position += 1
        finish = None
        if sequence.position >= sequence.params.max_tokens:
            finish = "length"
            del self.sequences[request_id]
        return StepOutput(request_id, (token,), logprobs, prompt_logprobs, finish)
