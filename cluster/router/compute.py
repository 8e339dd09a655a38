"""From a batch to tokens: on the host's terms, each step at once. `device_compute` does it on a GPU, a step ahead.

Shape legend: R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.errors import RequestError
from cluster.router.logprobs import token_logprobs
from cluster.router.params import TokenLogprobs
from cluster.router.sampler import Sampler
from cluster.router.sequence import Sequence
from cluster.router.token_masks import Begun
from cluster.routing.recorder import RoutingTrace
from workers.model.batch import Batch
from workers.model.decoder import Decoder
from workers.model.observer import RoutingObserver

Logits = NDArray[np.float32]
Experts = NDArray[np.int16]


class Draw(NamedTuple):
    """A token that is to be drawn for a sequence, from a row of the wanted logits."""

    row: int
    sequence: Sequence


class Drawn(NamedTuple):
    """The token, or why there is none, and its log-probabilities where they are asked for."""

    token: int | RequestError
    logprobs: TokenLogprobs | None = None


class Computed(Protocol):
    """A step that was started."""

    def drawn(self) -> list[Drawn]:
        """What was drawn, in the order of the draws; waits for the step to be complete. Once."""

    def logits(self, begin: int, end: int) -> Logits:
        """Rows of the wanted logits, [n, V]. Of steps that score prompts only."""

    def routing(self, begin: int, end: int) -> Experts:
        """The experts that computed these rows, [n, L, K]; after `drawn`. Of steps whose batch asks for it only."""


class Compute(Protocol):
    """Starts steps. Not thread-safe: one step loop owns it."""

    runs_ahead: bool  # whether a step may be started before what the one before it drew is known

    def start(self, step: int, batch: Batch, seats: Items[int], draws: Items[Draw]) -> Computed:
        """Start step number `step`. A token id of -1 is the one that the step before drew; `seats[s]`: as which of its
        draws, for each sequence of the batch; -1: none."""


class HostCompute:
    """Logits to the host, tokens drawn there. What the gates choose goes to `trace` where there is one."""

    runs_ahead = False

    def __init__(self, model: Decoder, trace: RoutingTrace | None = None) -> None:
        self._model = model
        self._trace = trace
        self._sampler = Sampler(model.spec.vocab_size)

    def start(self, step: int, batch: Batch, seats: Items[int], draws: Items[Draw]) -> Computed:
        """Computes it all."""
        return self._by_layers(step, batch, draws, self._observer())

    def _observer(self) -> RoutingObserver | None:
        """Who is told of this step's choices; None: it is not one of the sample."""
        return None if self._trace is None else self._trace.observer()

    def _by_layers(self, step: int, batch: Batch, draws: Items[Draw], observer: RoutingObserver | None) -> Computed:
        experts = self._model.experts
        experts.begin_step(step)
        return self._forward(batch, batch.split(experts.micro_batches(batch.n_rows)), draws, observer)

    def _forward(
        self, batch: Batch, cut: Items[Batch], draws: Items[Draw], observer: RoutingObserver | None = None
    ) -> Computed:
        begun = self._sampler.begin([draw.sequence for draw in draws])
        logits_RV = self._model.forward(cut, observer).cpu().numpy()
        routing_RLK = self._model.routing().cpu().numpy() if batch.routing else None
        return _OnHost(logits_RV, draws, self._sampler, begun, routing_RLK)


class _OnHost:
    """Logits that are complete."""

    def __init__(
        self,
        logits_RV: Logits,
        draws: Items[Draw],
        sampler: Sampler,
        begun: Begun,
        routing_RLK: Experts | None = None,
    ) -> None:
        self._logits_RV = logits_RV
        self._routing_RLK = routing_RLK
        self._draws = draws
        self._sampler = sampler
        self._begun = begun

    def logits(self, begin: int, end: int) -> Logits:
        return self._logits_RV[begin:end]

    def routing(self, begin: int, end: int) -> Experts:
        assert self._routing_RLK is not None, "no routing was asked for"
        return self._routing_RLK[begin:end]

    def drawn(self) -> list[Drawn]:
        if not self._draws:
            return []
        rows = [draw.row for draw in self._draws]
        logits_SV = self._logits_RV if len(rows) == len(self._logits_RV) else self._logits_RV[rows]
        sequences = [draw.sequence for draw in self._draws]
        return list(map(_scored, self._sampler.sample(logits_SV, sequences, self._begun), sequences, logits_SV))


def _scored(token: int | RequestError, sequence: Sequence, logits_V: Logits) -> Drawn:
    n_top = sequence.params.logprobs
    if n_top is None or isinstance(token, RequestError):
        return Drawn(token)
    return Drawn(token, token_logprobs(logits_V, token, n_top))
