"""Where a worker gets the weights of a new replica from: the checkpoint's files, or a worker that holds it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from workers.checkpoint import Checkpoint, ExpertWeights
from workers.errors import CheckpointError, ExpertMeshError
from workers.shard import ExpertShard
from workers.transport.grpc.peer_weights import PeerWeights

_log = logging.getLogger(__name__)

Order = Literal["storage", "peer", "auto"]


class WeightSource:
    """Both sources, in the order that `--weights` says. For one thread at a time.

    `storage`: the files alone. `peer`: a worker that holds the expert, and the files where none gives it. `auto`: the
    files, and a worker where they cannot be read any more.
    """

    def __init__(self, order: Order, checkpoint: Checkpoint, peers: PeerWeights | None) -> None:
        """peers: None where workers cannot ask each other."""
        self._order = order
        self._checkpoint = checkpoint
        self._peers = peers
        self.from_peers = 0  # replicas, since start

    def load(self, shard: ExpertShard, layer: int, expert: int, holders: Mapping[str, str]) -> None:
        """Put `(layer, expert)` into `shard`; holders: the addresses of other workers that have it.

        Raises CheckpointError or OSError where nobody has it to give.
        """
        if self._order == "peer" and (weights := self._ask(shard, layer, expert, holders)) is not None:
            shard.load(layer, expert, weights)
            return
        try:
            shard.load(layer, expert, self._checkpoint.expert(layer, expert, shard.read_as))
        except (CheckpointError, OSError) as error:
            if self._order != "auto" or (weights := self._ask(shard, layer, expert, holders)) is None:
                raise
            _log.warning("layer %d, expert %d comes from another worker: %s", layer, expert, error)
            shard.load(layer, expert, weights)

    def rest(self) -> None:
        """Nothing more is wanted for now: connections are ended."""
        if self._peers is not None:
            self._peers.close()

    def _ask(self, shard: ExpertShard, layer: int, expert: int, holders: Mapping[str, str]) -> ExpertWeights | None:
        """The weights from one of `holders`, those of different experts from different ones; None: none gives them."""
        if self._peers is None:
            return None
        names = sorted(holders)
        turn = (layer + expert) % max(1, len(names))
        for peer in names[turn:] + names[:turn]:
            try:
                weights = self._peers.fetch(
                    peer, holders[peer], layer, expert, shard.ffn_size, shard.hidden_size, shard.read_as.dtype
                )
            except ExpertMeshError as error:
                _log.warning("%s", error)
            else:
                self.from_peers += 1
                return weights
        return None
