"""The step loop of a router: schedule, compute, sample, commit.

Shape legend: R rows whose logits are wanted, S sequences that get a token, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.config import Config
from cluster.errors import ExpertMeshError, RequestError
from cluster.router import limits
from cluster.router.batching import logits_wanted, make_batch
from cluster.router.grammar import Grammar, GrammarCompiler
from cluster.router.kv_blocks import KVBlocks
from cluster.router.logprobs import token_logprobs
from cluster.router.params import Finish, SamplingParams, StepOutput, TokenLogprobs
from cluster.router.sampler import Sampler
from cluster.router.scheduler import Chunk, Scheduler
from cluster.router.sequence import Sequence, State
from cluster.router.sizing import context_limit
from workers.model.batch import Batch
from workers.model.decoder import Decoder

log = logging.getLogger(__name__)

_GRAMMAR_WAIT_S = 0.005  # commands wait as long

Logits = NDArray[np.float32]


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


class Engine:
    """Serves many sequences with one model.

    One thread submits and steps (`EngineThread` sees to it); `cancel` and `stats` are for any thread, also during a
    step. The end-of-sequence or stop token that ends a sequence is part of its output; stop strings are the gateway's
    business.
    """

    def __init__(self, model: Decoder, config: Config, grammars: GrammarCompiler | None = None) -> None:
        """`grammars`: for the model's tokenizer; None: requests with a grammar are refused."""
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
        )
        self._sampler = Sampler(model.spec.vocab_size)
        self._open: dict[str, Sequence] = {}
        self._outbox: list[StepOutput] = []
        # Held while the scheduler's state is looked at or changed, and not while the model computes. Blocks that are
        # freed meanwhile are still written by that step; nobody can get them before it has ended.
        self._lock = threading.Lock()
        self._steps = self._tokens = self._rows = self._cached = 0

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
        return bool(self._open or self._outbox)

    def step(self) -> list[StepOutput]:
        """One forward pass over what the scheduler chose; what it gave, request by request.

        Nothing is committed before every layer of the whole batch is complete. Whatever fails, the engine lives on: the
        requests of the batch end with an error, or all that are open when there was no batch yet.
        """
        outputs, self._outbox = self._outbox, []
        chunks: list[Chunk] = []
        try:
            with self._lock:
                chunks = self._scheduler.schedule()
                if not chunks:
                    self._await_grammar()
                    return outputs
                wanted_S = [logits_wanted(chunk) for chunk in chunks]
                batch = make_batch(chunks, wanted_S, self._blocks.block_size)
            logits_RV = self._forward(batch)
            with self._lock:
                self._commit(chunks, wanted_S, logits_RV, outputs)
        except Exception as error:
            with self._lock:
                outputs += self._fail([chunk.sequence for chunk in chunks] or list(self._open.values()), error)
        return outputs

    def stats(self) -> EngineStats:
        """Safe to call from any thread, also during a step."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_blocks=self._blocks.n_free,
            total_blocks=self._blocks.n_blocks,
            steps=self._steps,
            tokens=self._tokens,
            rows=self._rows,
            preemptions=self._scheduler.preemptions,
            cached_tokens=self._cached,
        )

    def _forward(self, batch: Batch) -> Logits:
        """The wanted logits on the host, float32 [R, V]."""
        experts = self.model.experts
        self._steps += 1
        experts.begin_step(self._steps)
        logits_RV: Logits = self.model.forward(batch.split(experts.micro_batches(batch.n_rows))).cpu().numpy()
        self._rows += batch.n_rows
        return logits_RV

    def _commit(self, chunks: Items[Chunk], wanted_S: Items[int], logits_RV: Logits, outputs: list[StepOutput]) -> None:
        """What is computed counts from here on; the sequences with nothing pending get their next token in `outputs`.

        Those that were cancelled while the model computed get nothing any more.
        """
        sequences: list[Sequence] = []
        rows: list[int] = []
        end = 0
        for chunk, wanted in zip(chunks, wanted_S, strict=True):
            sequence, completes = chunk.sequence, chunk.completes
            end += wanted
            if sequence.state is State.ENDED:
                continue
            if sequence.prompt_logprobs is not None:
                score_prompt(sequence, sequence.prompt_logprobs, logits_RV[end - wanted : end])
            self._scheduler.commit(sequence, chunk.n)
            if completes and sequence.params.max_tokens == 0:  # only the scores of its prompt were wanted
                outputs.append(self._end(sequence, "length"))
            elif completes:
                sequences.append(sequence)
                rows.append(end - 1)
        if sequences:
            logits_SV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
            outputs += map(self._emit, sequences, self._sampler.sample(logits_SV, sequences), logits_SV)

    def _await_grammar(self) -> None:
        """Nothing can be computed because every grammar is still being compiled: let that have the time."""
        for sequence in self._scheduler.waiting:
            if sequence.sampling.grammar is not None:
                sequence.sampling.grammar.wait(_GRAMMAR_WAIT_S)
                return

    def _emit(self, sequence: Sequence, token: int | RequestError, logits_V: Logits) -> StepOutput:
        """Commit `token`, and end the sequence with it if it is the last."""
        if isinstance(token, RequestError):
            return self._end(sequence, "error", str(token))
        scores = sequence.take_prompt_logprobs()
        sequence.append(token)
        self._tokens += 1
        finish = sequence.finish()
        if finish is not None:
            self._close(sequence.request_id)
        n_top = sequence.params.logprobs
        logprobs = () if n_top is None else (token_logprobs(logits_V, token, n_top),)
        cached = sequence.cached if sequence.n_emitted == 1 else 0
        self._cached += cached
        return StepOutput(sequence.request_id, (token,), logprobs, scores, finish, cached_tokens=cached)

    def _end(self, sequence: Sequence, finish: Finish, error: str | None = None) -> StepOutput:
        """End a sequence without a further token."""
        self._close(sequence.request_id)
        return StepOutput(sequence.request_id, (), (), sequence.take_prompt_logprobs(), finish, error)

    def _fail(self, sequences: Items[Sequence], error: Exception) -> list[StepOutput]:
        """End `sequences` with an error. They could be tried again, but whoever waits has waited enough, and which of
        them is to blame is not known."""
        expected = isinstance(error, ExpertMeshError)
        log.error("a step of %d sequences failed: %s", len(sequences), error, exc_info=None if expected else error)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        return [self._end(each, "error", reason) for each in sequences if each.state is not State.ENDED]

    def _close(self, request_id: str) -> None:
        """Forget an open request and free its blocks."""
        if (sequence := self._open.pop(request_id, None)) is not None:
            self._scheduler.end(sequence)


def score_prompt(sequence: Sequence, scores: list[TokenLogprobs | None], logits_RV: Logits) -> None:
    """Append the log-probabilities of the next prompt tokens, one per row; the prompt's last row scores none."""
    n_top = sequence.params.prompt_logprobs or 0
    for token, logits_V in zip(sequence.tokens[len(scores) : sequence.n_prompt], logits_RV, strict=False):
        scores.append(token_logprobs(logits_V, token, n_top))
