"""The scheduler under random arrivals, cancellations and tiny pools.

Catches: a block that is lost, freed twice, written while it is shared, or shared by those whose tokens differ; a
sequence that starves; a newcomer that overtakes; a step over its budget; a queue that is not bounded.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import RequestError
from cluster.router.kv_blocks import KVBlocks
from cluster.router.params import SamplingParams
from cluster.router.scheduler import Chunk, Scheduler
from cluster.router.sequence import Sequence, State


def sequence(name: str, n_prompt: int, max_tokens: int, n_emitted: int = 0, kind: int = 0) -> Sequence:
    """Prompts of one `kind` begin alike."""
    params = SamplingParams(max_tokens=max_tokens, cache_salt="salt" if kind % 3 == 2 else "")
    prompt = [*range(5), *range(kind // 3, kind // 3 + n_prompt)][:n_prompt]
    return Sequence(name, prompt, params, emitted_ids=range(n_emitted))


Memory = dict[tuple[int, int], tuple[str, list[int]]]  # what a place of a block holds: salt, and all tokens up to it


def commit(scheduler: Scheduler, chunks: list[Chunk], memory: Memory | None = None) -> None:
    """What the engine does after a forward pass; every token is 0. In `memory` K and V are written and looked at."""
    for chunk in chunks:
        completes, of = chunk.completes, chunk.sequence
        for position in range(of.computed + chunk.n if memory is not None else 0):
            assert memory is not None
            block, offset = divmod(position, scheduler.blocks.block_size)
            place = (of.blocks[block], offset)
            history = (of.params.cache_salt, of.tokens[: position + 1])
            if position >= of.computed:
                owners = sum(of.blocks[block] in running.blocks for running in scheduler.running)
                assert owners == 1, "a block that is written has one owner"
                memory[place] = history
            assert memory[place] == history
        scheduler.commit(of, chunk.n)
        if completes:
            chunk.sequence.append(0)
            if chunk.sequence.finish() is not None:
                scheduler.end(chunk.sequence)


def check(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """What must hold after every `schedule`."""
    blocks = scheduler.blocks
    held = [block for running in scheduler.running for block in running.blocks]
    assert len(set(held)) == blocks.n_blocks - blocks.n_free
    assert not any(waiting.blocks for waiting in scheduler.waiting)
    assert sum(chunk.n for chunk in chunks) <= scheduler.max_batch_tokens
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks) <= scheduler.max_sequences
    for chunk in chunks:
        assert chunk.sequence.state is State.RUNNING
        assert 1 <= chunk.n <= chunk.sequence.pending
        assert len(chunk.sequence.blocks) * blocks.block_size >= chunk.sequence.computed + chunk.n
    assert len(scheduler.running) <= scheduler.max_sequences


# prompt, max_tokens, emitted, kind of prompt
ARRIVAL = st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 19), st.integers(0, 5))


@settings(max_examples=150)
@given(
    events=st.lists(st.one_of(ARRIVAL, st.integers(0, 30), st.none()), max_size=60),  # arrival, cancel, step
    n_blocks=st.integers(1, 30),
    block_size=st.sampled_from([1, 3, 4]),
    max_batch_tokens=st.integers(1, 40),
    max_sequences=st.integers(1, 8),
)
def test_every_sequence_finishes_in_order_and_no_block_is_lost(
    events: list[object], n_blocks: int, block_size: int, max_batch_tokens: int, max_sequences: int
) -> None:
    scheduler = Scheduler(
        KVBlocks(n_blocks, block_size),
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_queue=1000,
    )
    memory: Memory = {}
    arrived: list[Sequence] = []
    order: dict[str, int] = {}

    def step() -> list[Chunk]:
        chunks = scheduler.schedule()
        check(scheduler, chunks)
        running = [order[s.request_id] for s in scheduler.running]
        waiting = [order[s.request_id] for s in scheduler.waiting]
        assert running + waiting == sorted(running + waiting), "first come, first served"
        commit(scheduler, chunks, memory)
        return chunks

    for event in events:
        if event is None:
            step()
        elif isinstance(event, int):
            if event < len(arrived):
                scheduler.end(arrived[event])
        else:
            n_prompt, max_tokens, n_emitted, kind = event  # type: ignore[misc]
            new = sequence(str(len(order)), n_prompt, max_tokens, min(n_emitted, max_tokens - 1), kind)
            fits = -(-(n_prompt + max_tokens - 1) // block_size) <= n_blocks
            order[new.request_id] = len(order)
            try:
                scheduler.submit(new)
                assert fits
                arrived.append(new)
            except RequestError as error:
                assert error.code == "context_length_exceeded" and not fits
    for _ in range(20_000):
        if not step():
            break
    assert not scheduler.running and not scheduler.waiting
    assert scheduler.blocks.n_free == n_blocks
    assert all(s.state is State.ENDED for s in arrived)


def test_decoding_goes_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    scheduler = Scheduler(KVBlocks(100, 4), max_batch_tokens=8, max_sequences=4, max_queue=10)
    short, long = sequence("short", 2, 50), sequence("long", 30, 50)
    scheduler.submit(short)
    commit(scheduler, scheduler.schedule())
    scheduler.submit(long)
    for computed in (7, 14, 21, 28, 30):
        chunks = scheduler.schedule()
        assert chunks[0] == Chunk(short, 1)
        commit(scheduler, chunks)
        assert long.computed == computed


def test_the_sequence_admitted_last_gives_way_and_comes_back_first() -> None:
    scheduler = Scheduler(KVBlocks(5, 2), max_batch_tokens=64, max_sequences=4, max_queue=10)
    first, second, third = (sequence(name, 2, 8) for name in "abc")
    for each in (first, second, third):
        scheduler.submit(each)
    preempted = False
    while scheduler.running or scheduler.waiting:
        chunks = scheduler.schedule()
        check(scheduler, chunks)
        if scheduler.preemptions and not preempted:
            preempted = True
            assert scheduler.waiting[0] is third and third.computed == 0 and third.n_emitted > 0
            assert scheduler.running == [first, second]
        commit(scheduler, chunks)
    assert preempted and scheduler.blocks.n_free == 5


def test_one_request_more_than_the_queue_holds_is_refused_with_429() -> None:
    scheduler = Scheduler(KVBlocks(100, 4), max_batch_tokens=8, max_sequences=1, max_queue=2)
    for name in "abc":  # one will run, two wait
        scheduler.submit(sequence(name, 2, 2))
    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            scheduler.submit(sequence("d", 2, 2))
        assert (caught.value.code, caught.value.status) == ("queue_full", 429)
        assert caught.value.retry_after_s and caught.value.retry_after_s >= 1
        scheduler.schedule()


def test_ending_twice_or_while_waiting_frees_once() -> None:
    scheduler = Scheduler(KVBlocks(10, 4), max_batch_tokens=8, max_sequences=1, max_queue=2)
    running, waiting = sequence("a", 5, 2), sequence("b", 5, 2)
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.schedule()
    assert scheduler.blocks.n_free == 8
    for each in (waiting, running, running, waiting):
        scheduler.end(each)
    assert scheduler.blocks.n_free == 10 and not scheduler.schedule()


def test_a_pool_refuses_to_give_or_take_what_it_must_not() -> None:
    blocks = KVBlocks(3, 4)
    taken = blocks.allocate(2)
    with pytest.raises(MemoryError):
        blocks.allocate(2)
    assert blocks.n_free == 1
    blocks.free(taken)
    with pytest.raises(ValueError, match="free already"):
        blocks.free(taken[:1])
    assert sorted(blocks.allocate(3)) == [0, 1, 2]
    assert [blocks.needed(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_of_those_who_wait_the_lowest_priority_goes_first() -> None:
    scheduler = Scheduler(KVBlocks(100, 4), max_batch_tokens=8, max_sequences=1, max_queue=10)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1)):
        scheduler.submit(Sequence(name, range(3), SamplingParams(max_tokens=1, priority=priority)))
    assert [waiting.request_id for waiting in scheduler.waiting] == ["c", "e", "a", "d", "b"]


def test_who_waits_too_long_is_overdue_unless_it_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(KVBlocks(100, 4), max_batch_tokens=8, max_sequences=1, max_queue=10, max_wait_s=30)
    running, waiting, continued = sequence("a", 3, 5), sequence("b", 3, 5), sequence("c", 3, 5, 2)
    for each in (running, waiting, continued):
        scheduler.submit(each)
    commit(scheduler, scheduler.schedule())
    assert scheduler.overdue() == []
    for each in (running, waiting, continued):
        each.arrived -= 31
    assert scheduler.overdue() == [waiting]


def of_tenant(tenant: str, name: str, n_prompt: int = 4, max_tokens: int = 1000) -> Sequence:
    return Sequence(name, range(n_prompt), SamplingParams(max_tokens=max_tokens, tenant=tenant))


def crowded(n_blocks: int = 1000, max_sequences: int = 8, max_queue: int = 256) -> Scheduler:
    """One that `a` has to itself, with as many waiting."""
    blocks = KVBlocks(n_blocks, 4)
    scheduler = Scheduler(blocks, max_batch_tokens=64, max_sequences=max_sequences, max_queue=max_queue)
    for i in range(2 * max_sequences):
        scheduler.submit(of_tenant("a", f"a{i}"))
    commit(scheduler, scheduler.schedule())
    return scheduler


def running(scheduler: Scheduler, tenant: str) -> int:
    return sum(each.params.tenant == tenant for each in scheduler.running)


def test_a_tenant_below_its_share_gets_seats_at_once_and_no_more_than_that() -> None:
    scheduler = crowded()
    for i in range(8):
        scheduler.submit(of_tenant("b", f"b{i}"))
    held = []
    for _ in range(10):
        chunks = scheduler.schedule()
        check(scheduler, chunks)
        commit(scheduler, chunks)
        held.append((running(scheduler, "a"), running(scheduler, "b")))
    assert held[0] == (7, 1) and held[-1] == (4, 4) and scheduler.preemptions == 4
    assert [each.request_id for each in scheduler.waiting][:4] == ["a4", "a5", "a6", "a7"], "their turn comes first"
    for each in [each for each in scheduler.running if each.params.tenant == "b"]:
        scheduler.end(each)
    commit(scheduler, scheduler.schedule())
    assert running(scheduler, "b") == 4, "what b leaves is b's again as long as it waits"


def test_tenants_that_come_one_by_one_end_with_equal_shares() -> None:
    scheduler = crowded(max_sequences=9)
    for tenant in "bc":
        for i in range(20):
            scheduler.submit(of_tenant(tenant, f"{tenant}{i}"))
    for _ in range(30):
        chunks = scheduler.schedule()
        check(scheduler, chunks)
        commit(scheduler, chunks)
    assert [running(scheduler, tenant) for tenant in "abc"] == [3, 3, 3] and scheduler.preemptions == 6


def test_a_tenant_with_all_blocks_gives_some_back() -> None:
    pool = KVBlocks(40, 4)
    scheduler = Scheduler(pool, max_batch_tokens=400, max_sequences=64, max_queue=10, shares_prefixes=False)
    for i in range(3):
        scheduler.submit(of_tenant("a", f"a{i}", n_prompt=44, max_tokens=20))
    commit(scheduler, scheduler.schedule())
    assert running(scheduler, "a") == 3
    scheduler.submit(of_tenant("b", "b", n_prompt=40, max_tokens=20))
    chunks = scheduler.schedule()
    check(scheduler, chunks)
    assert running(scheduler, "b") == 1 and running(scheduler, "a") == 2
    for _ in range(100):
        commit(scheduler, chunks)
        chunks = scheduler.schedule()
        check(scheduler, chunks)
    assert not scheduler.running and not scheduler.waiting, "and all of them end"


def test_a_full_queue_takes_who_has_a_seat_of_its_own() -> None:
    scheduler = crowded(max_queue=8)
    with pytest.raises(RequestError, match="waiting already"):
        scheduler.submit(of_tenant("a", "one more"))
    for i in range(4):
        scheduler.submit(of_tenant("b", f"b{i}"))
    with pytest.raises(RequestError, match="waiting already"):
        scheduler.submit(of_tenant("b", "one more"))


def test_a_priority_orders_the_requests_of_its_own_tenant_only() -> None:
    scheduler = crowded()
    urgent = SamplingParams(max_tokens=9, tenant="a", priority=-5)
    scheduler.submit(Sequence("urgent", range(4), urgent))
    scheduler.submit(of_tenant("b", "b"))
    scheduler.schedule()
    assert running(scheduler, "b") == 1 and scheduler.waiting[0].request_id == "a7"
    scheduler.end(scheduler.running[0])
    scheduler.end(scheduler.waiting[0])
    scheduler.schedule()
    assert any(each.request_id == "urgent" for each in scheduler.running)
