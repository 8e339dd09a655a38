"""Steps of a router on a GPU whose experts are on others: decoding captured where the workers step along, else layer by
layer through the exchange, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from cluster.router.compute import Computed, Draw, HostCompute
from cluster.router.device_compute import OnDevice
from cluster.router.device_sampler import DeviceSampler
from cluster.router.exchange.exchange import Exchange
from cluster.routing.recorder import RoutingTrace
from workers.device import to_host
from workers.model.batch import Batch
from workers.model.decode_graphs import DecodeGraphs
from workers.model.decoder import Decoder
from workers.model.warm_up import warm_up


class ExchangeCompute(HostCompute):
    """A step whose workers did not answer in time is thrown away and computed again through the exchange, which
    repairs: keys and values are written to the same places, and the tokens are the same."""

    def __init__(
        self,
        model: Decoder,
        exchange: Exchange,
        max_sequences: int,
        max_context: int,
        most_rows: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        trace: RoutingTrace | None = None,
    ) -> None:
        """Captures the decoding steps, where what they are captured with is there; else each size when it is first run.
        Compiles what prompts take in steps of up to `most_rows`.

        `exchange` captures steps.
        """
        super().__init__(model, trace)
        self._exchange = exchange
        self._n_seats = max_sequences
        self._graphs = DecodeGraphs(model, max_sequences, max_context)
        if exchange.steps is None:
            self._graphs.allow(max_sequences)
        else:
            self._graphs.capture(max_sequences, progress, exchange.steps, exchange.steps_key)
        warm_up(model, most_rows)
        self._device_sampler = DeviceSampler(model.spec.vocab_size, self._graphs.last_N)

    def start(self, step: int, batch: Batch, seats: Items[int], draws: Items[Draw]) -> Computed:
        scores = any(draw.sequence.wants_prompt_logprobs for draw in draws)
        observer = self._observer()
        captured = observer is None and not scores and self._graphs.takes(batch)
        if captured and self._exchange.begin_steps(batch.n_rows):
            exchange, nobody = self._exchange, [self._n_seats] * batch.n_rows
            logits_RV = self._graphs.run(batch, nobody, exchange.steps, exchange.steps_key)
            routing_RLK = to_host(self._graphs.routing(batch.n_rows)) if batch.routing else None
            pending = self._device_sampler.start(logits_RV, draws)
            if self._exchange.end_steps():
                return OnDevice(pending, None, routing_RLK)
        return self._by_layers(step, batch, draws, observer)
