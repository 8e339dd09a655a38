"""Steps on a GPU, one ahead of the host: decoding by captured graphs, prompts kernel by kernel, tokens drawn there.

The next step reads the token that was drawn for a sequence from the device; the host waits once a step, for the tokens
of the step before. Everything runs on one stream, in order: a block that a cancelled sequence gave back is written by
whoever got it after the last step that still knew its old owner.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cluster.router.compute import Computed, Draw, Drawn, Experts, Logits
from cluster.router.device_sampler import DeviceSampler, Pending
from cluster.routing.recorder import RoutingTrace
from workers.device import to_device, to_host
from workers.model.batch import Batch
from workers.model.decode_graphs import DecodeGraphs
from workers.model.decoder import Decoder
from workers.model.warm_up import warm_up


class DeviceCompute:
    """The steps of a model on a GPU whose experts only launch."""

    runs_ahead = True

    def __init__(
        self,
        model: Decoder,
        max_sequences: int,
        max_context: int,
        most_rows: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        trace: RoutingTrace | None = None,
    ) -> None:
        """Captures the decoding steps, and compiles what prompts take in steps of up to `most_rows`; `progress` is told
        how many of how many captures are done."""
        self._model = model
        self._trace = trace
        self._n_seats = max_sequences
        self._graphs = DecodeGraphs(model, max_sequences, max_context)
        self._graphs.capture(max_sequences, progress)
        warm_up(model, most_rows)
        self._sampler = DeviceSampler(model.spec.vocab_size, self._graphs.last_N)

    def start(self, step: int, batch: Batch, seats: Items[int], draws: Items[Draw]) -> Computed:
        self._model.experts.begin_step(step)
        known = [seat if seat >= 0 else self._n_seats for seat in seats]
        observer = None if self._trace is None else self._trace.observer()
        if observer is None and self._graphs.takes(batch):
            logits_RV = self._graphs.run(batch, known)
            routing_RLK = to_host(self._graphs.routing(batch.n_rows)) if batch.routing else None
        else:
            seat_T = np.repeat(np.array(known), np.diff(batch.q_start))
            device = self._model.cache.device
            token_T = self._graphs.known(
                to_device(batch.token_ids_T, device), to_device(torch.from_numpy(seat_T), device)
            )
            logits_RV = self._model.forward([replace(batch, token_ids_T=token_T)], observer)
            routing_RLK = to_host(self._model.routing()) if batch.routing else None
        scores = any(draw.sequence.wants_prompt_logprobs for draw in draws) or len(batch.logit_rows_R) > len(draws)
        # What is drawn comes to the host after the routing.
        return OnDevice(self._sampler.start(logits_RV, draws), logits_RV if scores else None, routing_RLK)


class OnDevice:
    """A step that runs."""

    def __init__(self, pending: Pending, logits_RV: Tensor | None, routing_RLK: Tensor | None = None) -> None:
        self._pending = pending
        self._routing_RLK = routing_RLK
        self._host_RV: Logits | None = None if logits_RV is None else logits_RV.cpu().numpy()

    def drawn(self) -> list[Drawn]:
        return self._pending.result()

    def logits(self, begin: int, end: int) -> Logits:
        assert self._host_RV is not None, "no prompt was to be scored"
        return self._host_RV[begin:end]

    def routing(self, begin: int, end: int) -> Experts:
        assert self._routing_RLK is not None, "no routing was asked for"
        experts_NLK: Experts = self._routing_RLK[begin:end].numpy()
        return experts_NLK
