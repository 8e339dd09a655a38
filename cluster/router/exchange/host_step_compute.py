"""Steps of a router on a CPU whose experts are on the same host: decoding captured whole, the exchange included."""

from __future__ import annotations

from collections.abc import Sequence as Items

from cluster.router.compute import Computed, Draw, HostCompute
from cluster.router.exchange.exchange import Exchange
from cluster.routing.recorder import RoutingTrace
from workers.model.batch import Batch
from workers.model.decoder import Decoder


class HostStepCompute(HostCompute):
    """A step that is void is thrown away and computed again layer by layer, where the exchange repairs: keys and values
    are written to the same places, and the tokens are the same."""

    def __init__(self, model: Decoder, exchange: Exchange, trace: RoutingTrace | None = None) -> None:
        super().__init__(model, trace)
        self._exchange = exchange

    def start(self, step: int, batch: Batch, seats: Items[int], draws: Items[Draw]) -> Computed:
        observer = self._observer()
        self._exchange.begin_step(step)
        if observer is None and self._model.captures(batch) and self._exchange.begin_steps(batch.n_rows):
            computed = self._forward(batch, [batch], draws)
            if self._exchange.end_steps():
                return computed
        return self._by_layers(step, batch, draws, observer)
