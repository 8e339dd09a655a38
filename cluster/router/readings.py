"""The series of a router, read from what its step loop and its exchange count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.observe.exposition import Reading
from cluster.observe.series import router as series
from workers.shard import ExpertShard

if TYPE_CHECKING:
    from cluster.router.engine import Engine
    from cluster.router.exchange.exchange import Exchange


def of_engine(engine: Engine) -> Iterable[Reading]:
    """The step loop's."""
    stats, counters = engine.stats(), engine.counters
    yield Reading(series.RUNNING, stats.running)
    yield Reading(series.WAITING, stats.waiting)
    yield Reading(series.PREEMPTIONS, stats.preemptions)
    yield Reading(series.KV_USAGE, 1 - stats.free_blocks / stats.total_blocks)
    yield Reading(series.KV_BLOCKS, stats.total_blocks)
    yield Reading(series.PREFIX_QUERIES, counters.queried)
    yield Reading(series.PREFIX_HITS, counters.cached)
    yield Reading(series.STEP, counters.seconds)
    yield Reading(series.ROWS, counters.sizes)
    yield Reading(series.EMITTED, counters.tokens)
    yield Reading(series.QUEUE, counters.queue)
    yield Reading(series.PREFILL, counters.prefill)
    yield Reading(series.DECODE, counters.decode)


def of_own_experts(engine: Engine) -> Iterable[Reading]:
    """Of a router that holds the experts itself."""
    if isinstance(shard := engine.model.experts, ExpertShard):
        for slot in shard.slots:
            yield Reading(series.EXPERT_TOKENS, slot.rows, (str(slot.layer), str(slot.expert)))


def of_exchange(exchange: Exchange, per_expert: bool) -> Iterable[Reading]:
    """The exchange's; those of each expert and layer only with `per_expert`."""
    counters, workers = exchange.counters, frozenset(exchange.workers)
    for worker, rows_L in counters.rows_L.copy().items():
        if worker not in workers:  # it has left
            continue
        if per_expert:
            rows = enumerate(rows_L.tolist())
            yield from (Reading(series.WORKER_TOKENS, n, (str(layer), worker)) for layer, n in rows)
        else:
            yield Reading(series.WORKER_TOKENS, int(rows_L.sum()), ("all", worker))
    if per_expert:
        for layer, rows_E in enumerate(counters.rows_LE.tolist()):
            if layer not in exchange.dense_layers:
                rows = enumerate(rows_E)
                yield from (Reading(series.EXPERT_TOKENS, n, (str(layer), str(expert))) for expert, n in rows)
    for labels, traffic in counters.traffic.copy().items():
        if labels[0] not in workers:
            continue
        yield Reading(series.REQUESTS, traffic.requests, labels)
        yield Reading(series.SENT, traffic.sent_bytes, labels)
        yield Reading(series.RECEIVED, traffic.received_bytes, labels)
        yield Reading(series.DISPATCH, traffic.dispatch_seconds, labels)
        yield Reading(series.WAIT, traffic.wait_seconds, labels)
        yield Reading(series.COMPUTE, traffic.compute_seconds, labels)
    ejected = exchange.ejected
    for worker in sorted(workers):
        yield Reading(series.RETRIES, counters.retries[worker], (worker,))
        yield Reading(series.DEADLINES, counters.late[worker], (worker,))
        yield Reading(series.HEDGES, counters.hedged[worker], (worker,))
        yield Reading(series.EJECTED, float(worker in ejected), (worker,))
    yield Reading(series.EXCHANGE, counters.exchanges)
    yield Reading(series.SPLIT, counters.split_seconds)
    yield Reading(series.COMBINE, counters.combine_seconds)
    yield Reading(series.FENCED, exchange.dropped_replies)
    yield Reading(series.REPAIR, counters.repair_seconds)
    yield Reading(series.CAPTURED, counters.captured_steps)
    yield Reading(series.VOID, counters.void_steps)
