"""The step loop of a router: schedule, compute, sample, commit.

Shape legend: R rows whose logits are wanted, S sequences that get a token, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

from cluster.config import Config
from cluster.errors import ExpertMeshError, RequestError
from cluster.router import limits
from cluster.router.batching import logits_wanted, make_batch
from cluster.router.codec import internal_error
from cluster.router.compute import Compute, Computed, Draw, Drawn, HostCompute, Logits
from cluster.router.grammar import Grammar, GrammarCompiler
from cluster.router.kv_blocks import KVBlocks
from cluster.router.logprobs import token_logprobs
from cluster.router.params import Finish, SamplingParams, StepOutput, TokenLogprobs
from cluster.router.scheduler import Chunk, Scheduler
from cluster.router.sequence import Sequence, State
from cluster.router.sizing import context_limit
from cluster.router.spans import RouterSpans
from cluster.router.step_counters import StepCounters
from workers.device import end_if_lost
from workers.model.decoder import Decoder

log = logging.getLogger(__name__)

_GRAMMAR_WAIT_S = 0.005  # commands wait as long


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Numbers for people and metrics. Counters run since start."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
    tokens: int  # emitted
    rows: int  # token rows computed: prompts, decoding and recomputation
    preemptions: int
    cached_tokens: int  # of prompts, that were in the KV cache already


@dataclass(slots=True)
class _Flight:
    """A step under way."""

    chunks: list[Chunk]
    wanted_S: list[int]
    completes_S: list[bool]
    first_S: list[int]  # the position of each chunk's first row
    began: float  # time.monotonic()
    computed: Computed | None = None

    @property
    def draws(self) -> list[Draw]:
        """One for each sequence that gets a token."""
        ends_S = accumulate(self.wanted_S)
        return [
            Draw(end - 1, chunk.sequence)
            for chunk, end, completes in zip(self.chunks, ends_S, self.completes_S, strict=True)
            if completes and chunk.sequence.params.max_tokens > 0
        ]

    @property
    def is_free(self) -> bool:
        """Whether the step after it can be started before it is complete."""
        return all(chunk.sequence.is_free for chunk in self.chunks)


class Engine:
    """Serves many sequences with one model.

    One thread submits and steps (`EngineThread` sees to it); `cancel` and `stats` are for any thread, also during a
    step. The end-of-sequence or stop token that ends a sequence is part of its output; stop strings are the gateway's
    business.
    """

    def __init__(
        self,
        model: Decoder,
        config: Config,
        grammars: GrammarCompiler | None = None,
        compute: Compute | None = None,
        spans: RouterSpans | None = None,
    ) -> None:
        """`grammars`: for the model's tokenizer; None: requests with a grammar are refused. `compute`: how steps are
        computed; None: at once, with tokens drawn on the host. `spans`: those of its exchange too, if it has one."""
        self.model = model
        self._grammars = grammars
        self._blocks = KVBlocks(model.cache.n_blocks, model.cache.block_size)
        self.max_context = context_limit(config, model.spec, self._blocks.n_blocks)
        self._scheduler = Scheduler(
            self._blocks,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            max_queue=config.max_queue,
            shares_prefixes=config.prefix_cache,
            max_wait_s=config.max_queue_wait_s,
        )
        self._compute = compute or HostCompute(model)
        self._flight: _Flight | None = None
        self._open: dict[str, Sequence] = {}
        self._outbox: list[StepOutput] = []
        # Held while the scheduler's state is looked at or changed, and not while the model computes. Blocks that are
        # freed meanwhile are still written by that step; nobody can get them before it has ended.
        self._lock = threading.Lock()
        self.counters = StepCounters()
        self.spans = spans or RouterSpans()

    def submit(
        self, request_id: str, prompt_ids: Items[int], params: SamplingParams, emitted_ids: Items[int] = ()
    ) -> None:
        """Queue a request; `emitted_ids` are the tokens another router gave it already.

        Raises RequestError: a field out of its limits, a context that can never fit, a full queue, an id in use.
        """
        if request_id in self._open:
            raise RequestError(f"request id {request_id} is in use", code="invalid_value", param="request_id")
        spec = self.model.spec
        limits.check(prompt_ids, params, vocab_size=spec.vocab_size, max_context=self.max_context)
        limits.check_emitted(emitted_ids, params, vocab_size=spec.vocab_size)
        grammar = None
        if params.grammar:
            if self._grammars is None:
                raise RequestError("this router has no tokenizer", code="unsupported_parameter", param="grammar")
            grammar = Grammar(self._grammars.compile(params.grammar), emitted_ids)
        sequence = Sequence(
            request_id, prompt_ids, params, eos_ids=spec.eos_ids, emitted_ids=emitted_ids, grammar=grammar
        )
        finish = sequence.finish()
        if finish is not None and not sequence.wants_prompt_logprobs:
            # Its router died between last token and end; or one prompt token is to be scored, and the first has none.
            scores = sequence.take_prompt_logprobs()
            self._outbox.append(StepOutput(request_id, (), prompt_logprobs=scores, finish=finish))
            return
        with self._lock:
            self._scheduler.submit(sequence)
            self._open[request_id] = sequence

    def cancel(self, request_id: str) -> None:
        """End a request without a further output; its blocks are free at once, whatever the step in progress waits
        for. Unknown ids are ignored."""
        with self._lock:
            self._close(request_id)

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._open or self._outbox or self._flight)

    def step(self) -> list[StepOutput]:
        """Start the next step over what the scheduler chose, and give what the one before it gave, request by request.

        Where a step cannot be started before the tokens of the one before are known, or computes at once, the order is
        the other way round. Nothing is committed before every layer of the whole batch is complete. Whatever fails, the
        engine lives on: the requests of the batch end with an error, or all that are open when there was no batch yet.
        """
        outputs, self._outbox = self._outbox, []
        if self._flight is not None and not self._flight.is_free:
            self._land(outputs)
        started = self._start(outputs)
        self._land(outputs)
        if started is not None:
            self._depart(started)
        self._flight = started
        if not self._compute.runs_ahead:
            self._land(outputs)
        return outputs

    def stats(self) -> EngineStats:
        """Safe to call from any thread, also during a step."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_blocks=self._blocks.n_free,
            total_blocks=self._blocks.n_blocks,
            steps=self.counters.steps,
            tokens=self.counters.tokens,
            rows=self.counters.rows,
            preemptions=self._scheduler.preemptions,
            cached_tokens=self.counters.cached,
        )

    def _start(self, outputs: list[StepOutput]) -> _Flight | None:
        """The next step, under way; None: there is nothing to compute, or it failed."""
        chunks: list[Chunk] = []
        began = time.monotonic()
        try:
            with self._lock:
                outputs += [self._end(each, "error", self._overdue()) for each in self._scheduler.overdue()]
                chunks = self._scheduler.schedule()
                if not chunks:
                    if self._flight is None:
                        self._await_grammar()
                    return None
                wanted_S = [logits_wanted(chunk) for chunk in chunks]
                batch = make_batch(chunks, wanted_S, self._blocks.block_size)
                completes_S = [chunk.completes for chunk in chunks]
                first_S = [chunk.sequence.computed for chunk in chunks]
                flight = _Flight(chunks, wanted_S, completes_S, first_S, began)
                seats = [chunk.sequence.ahead for chunk in chunks]
            self.counters.started(batch.n_rows)
            number = self.counters.steps
            with self.spans.step(number, batch.n_rows, (chunk.sequence for chunk in chunks)):
                flight.computed = self._compute.start(number, batch, seats, flight.draws)
            return flight
        except Exception as error:
            end_if_lost(self.model.cache.device, error)
            with self._lock:
                outputs += self._fail([chunk.sequence for chunk in chunks] or list(self._open.values()), error)
            return None

    def _depart(self, flight: _Flight) -> None:
        """What a step computes counts from here on, and its tokens are on their way where they are not known at once.

        After the step before it has landed, so that every token it computes with is known.
        """
        with self._lock:
            for sequence, n in flight.chunks:
                if sequence.state is State.RUNNING:
                    self._scheduler.commit(sequence, n)
            if self._compute.runs_ahead:
                for index, draw in enumerate(flight.draws):
                    draw.sequence.ahead = index

    def _land(self, outputs: list[StepOutput]) -> None:
        """Wait for the step under way, if there is one, and commit what it gave."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            assert flight.computed is not None
            drawn = flight.computed.drawn()
            with self._lock:
                self._commit(flight, flight.computed, drawn, outputs)
        except Exception as error:
            end_if_lost(self.model.cache.device, error)
            with self._lock:
                for chunk in flight.chunks:  # what they were to hold may not be there
                    self._blocks.forget(chunk.sequence.blocks)
                outputs += self._fail([chunk.sequence for chunk in flight.chunks], error)

    def _commit(self, flight: _Flight, computed: Computed, drawn: Items[Drawn], outputs: list[StepOutput]) -> None:
        """The sequences with nothing pending get their next token in `outputs`.

        Those that were cancelled while the model computed get nothing any more.
        """
        end, now = 0, time.monotonic()
        self.counters.seconds.add(now - flight.began)
        tokens = iter(drawn)
        steps = zip(flight.chunks, flight.wanted_S, flight.completes_S, flight.first_S, strict=True)
        for chunk, wanted, completes, first in steps:
            sequence = chunk.sequence
            end += wanted
            given = next(tokens) if completes and sequence.params.max_tokens > 0 else None
            if sequence.state is State.ENDED:
                continue
            if sequence.wants_prompt_logprobs and sequence.prompt_logprobs is not None:
                score_prompt(sequence, sequence.prompt_logprobs, computed.logits(end - wanted, end))
            if sequence.params.routing and wanted and self.model.spec.n_experts:
                experts_NLK = computed.routing(end - wanted, end)
                sequence.note_routing(first + chunk.n - wanted, experts_NLK)
            if given is not None:
                outputs.append(self._emit(sequence, given, now))
            elif completes:  # only the scores of its prompt were wanted
                outputs.append(self._end(sequence, "length"))

    def _overdue(self) -> RequestError:
        message = f"this request waited {self._scheduler.max_wait_s:g} s for its turn; try again later"
        return RequestError(message, code="queue_timeout", status=429, retry_after_s=1 + len(self._scheduler.waiting))

    def _await_grammar(self) -> None:
        """Nothing can be computed because every grammar is still being compiled: let that have the time."""
        for sequence in self._scheduler.waiting:
            if sequence.sampling.grammar is not None:
                sequence.sampling.grammar.wait(_GRAMMAR_WAIT_S)
                return

    def _emit(self, sequence: Sequence, given: Drawn, now: float) -> StepOutput:
        """Commit a token, and end the sequence with it if it is the last."""
        if isinstance(given.token, RequestError):
            return self._end(sequence, "error", given.token)
        scores = sequence.take_prompt_logprobs()
        sequence.append(given.token)
        cached = self.counters.emitted(sequence, now)
        if sequence.first_token_at == now:
            self.spans.first_token(sequence, now)
        finish = sequence.finish()
        if finish is not None:
            self.counters.ended(sequence, now)
            self._close(sequence.request_id)
        logprobs = () if given.logprobs is None else (given.logprobs,)
        routing = sequence.take_routing() if sequence.params.routing else None
        return StepOutput(
            sequence.request_id, (given.token,), logprobs, scores, finish, cached_tokens=cached, routing=routing
        )

    def _end(self, sequence: Sequence, finish: Finish, error: RequestError | None = None) -> StepOutput:
        """End a sequence without a further token."""
        self._close(sequence.request_id)
        return StepOutput(sequence.request_id, (), (), sequence.take_prompt_logprobs(), finish, error)

    def _fail(self, sequences: Items[Sequence], error: Exception) -> list[StepOutput]:
        """End `sequences` with an error. They could be tried again, but whoever waits has waited enough, and which of
        them is to blame is not known."""
        expected = isinstance(error, ExpertMeshError)
        said = {"request_ids": [each.params.origin for each in sequences]}
        trace = None if expected else error
        log.error("a step of %d sequences failed: %s", len(sequences), error, exc_info=trace, extra=said)
        # Which of our processes and classes failed is the log's business, not a client's.
        return [self._end(each, "error", internal_error()) for each in sequences if each.state is not State.ENDED]

    def _close(self, request_id: str) -> None:
        """Forget an open request and free its blocks."""
        if (sequence := self._open.pop(request_id, None)) is not None:
            self._scheduler.end(sequence)


def score_prompt(sequence: Sequence, scores: list[TokenLogprobs | None], logits_RV: Logits) -> None:
    """Append the log-probabilities of the next prompt tokens, one per row; the prompt's last row scores none."""
    n_top = sequence.params.prompt_logprobs or 0
    for token, logits_V in zip(sequence.tokens[len(scores) : sequence.n_prompt], logits_RV, strict=False):
        scores.append(token_logprobs(logits_V, token, n_top))
