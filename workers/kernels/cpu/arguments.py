"""The arguments of every compiled kernel: the one definition that callers and kernels share.

Every field is 8 bytes: an address, a size, a number of bytes, or a float32. A kernel reads them by name (see
`compiled.jit.reader`), a caller names them too, so a new field cannot shift the others on one side alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Linear(NamedTuple):
    """y[T, N] = x[T, K] @ weight[N, K].T + bias. If `gated`, the first half of a row is then silu(it) * the second."""

    x: int
    x_stride: int
    weight: int
    gated: int
    bias: int  # 0: none; nor of what is gated
    y: int
    n_rows: int
    k: int
    n: int
    kind: int  # how weights are stored
    rows: int  # int64 [team, T]: room for the rows' addresses


class Norm(NamedTuple):
    """x[T, D] += scale * delta, then y = x / rms(x) * weight."""

    x: int
    x_stride: int
    delta: int  # 0: none
    delta_stride: int
    weight: int  # 0: no y
    y: int
    n_rows: int
    d: int
    eps: float
    scale: float


class RotaryWrite(NamedTuple):
    qkv: int
    qkv_stride: int
    q: int
    n_rows: int
    n_heads: int
    n_kv: int
    head: int
    rotated: int  # of a head
    slot: int
    cos: int
    sin: int
    keys: int
    values: int
    q_norm: int  # 0: none
    k_norm: int
    q_norm_size: int  # entries that are normalised together
    k_norm_size: int
    eps: float


class Attention(NamedTuple):
    q: int
    out: int
    n_rows: int
    rows: int  # that one thread takes at a time
    n_heads: int
    n_kv: int
    head: int
    keys: int
    values: int
    block_size: int
    tables: int
    table_stride: int
    sequence: int
    position: int
    window: int
    scratch: int  # each thread's: addresses of the queries of `rows` and of their results, then their scores
    scratch_stride: int
    score_stride: int
    scale: float


class Gate(NamedTuple):
    logits: int
    logits_stride: int
    bias: int  # 0: none
    ids: int
    weights: int
    n_rows: int
    n_experts: int
    k: int
    sigmoid: int
    normalize: int
    scores: int  # float32 [E]: room for a row's
    scale: float


class GateRows(NamedTuple):
    """y[T, D] *= sigmoid(logits[T])."""

    y: int
    logits: int
    n_rows: int
    d: int


class Plan(NamedTuple):
    ids: int
    weights: int
    owner: int  # 0: one worker has all experts
    counter: int  # 0: none
    n_tokens: int
    k: int
    n_experts: int
    n_workers: int
    memory: int


class PackRequest(NamedTuple):
    """A worker's request behind its header: rows, token_P, expert_P."""

    x: int
    x_stride: int
    d: int
    row: int  # int64: which rows
    n_rows: int
    token: int  # int32
    expert: int  # int32
    n_pairs: int
    out: int


class WeightedSum(NamedTuple):
    parts: int  # int64 [parts, 2]: the first pair of each part, ascending from 0, and where its rows begin
    n_parts: int
    place: int
    weights: int
    out: int
    n_tokens: int
    k: int
    d: int


class Pairs(NamedTuple):
    """Where the experts' rows begin, and the addresses of each pair's row of x and of its hidden row."""

    token: int  # int32
    expert: int  # int32, ascending
    n_pairs: int
    n_experts: int
    table: int
    counters: int
    x: int
    x_stride: int
    hidden: int
    hidden_stride: int
    starts: int
    token_rows: int
    hidden_rows: int
    active: int  # int64 [1 + E]: how many experts have both rows and weights, then which
    missing: int  # int64: the pairs whose experts have no weights are added to it


class Experts(NamedTuple):
    """y[pair, D] = w2 (silu(w1 x) * (w3 x)) of every pair whose expert has weights."""

    table: int
    active: int
    starts: int
    token_rows: int
    hidden: int  # [P, 2F]: the gate's products, then the hidden rows, and the up products
    hidden_stride: int
    hidden_rows: int
    y: int
    d: int
    f: int
    kind: int


class ReadRequest(NamedTuple):
    message: int
    n_bytes: int
    request_word: int  # the first word of a request
    reply: int
    reply_word: int
    tables: int  # int64 [layers, 2]: the addresses of each layer's table and counters
    n_layers: int
    n_pairs: int  # that the reply has room for
    pairs: int  # where the arguments of `Pairs` are: what the request says is filled in
    experts: int  # and those of `Experts`
    d: int
    copies: int  # int32 [2 * n_pairs]: room for the pairs, which the sender may change after they were checked


class System(NamedTuple):
    """What kernels call of the C library and of OpenMP: addresses, but for the number of a system call."""

    syscall: int
    clock_gettime: int
    trylock: int
    unlock: int
    parallel: int  # GOMP_parallel; 0: there is none
    futex: int  # the number of that system call
    nap: int  # how long a thread sleeps at most before it looks again: a timespec


class RingPublish(NamedTuple):
    """Note a message in the control page of a ring, count it, and wake who waits for it."""

    page: int
    begin: int  # of the message: an offset
    n_bytes: int
    asked: int  # how many workers were asked at once
    system: int


class RingRoom(NamedTuple):
    """Find the first gap in a ring that is wide enough; then the first counter becomes where it begins, or 0."""

    page: int
    freed: int  # messages that nobody reads any more, as an int32
    n_bytes: int
    ring_bytes: int


class RingSleep(NamedTuple):
    """Sleep while the count is the known one, for a nap; then the first counter becomes the count."""

    sent: int
    known: int
    system: int


class RingServe(NamedTuple):
    """Answer what comes in a ring into another, one request after the other, until one comes that kernels do not
    answer: of many rows, wrong, while somebody else computes, or without room for its reply."""

    requests: int  # the router's ring
    replies: int  # this process's
    ring_bytes: int
    received: int  # requests taken in, and replies whose room is free again, as int32: changed as it goes on
    freed: int
    closed: int  # set by another thread: return
    waited_ns: int  # the mean of the last times that a request was waited for
    computing: int  # locks: the batcher's
    holding: int  # and the shard's
    counts: int  # int64: pairs, nanoseconds, and calls by their pairs: at most 1, 2, 4, ...
    n_sizes: int
    threads: int
    cores: int  # that workers which are asked at once share
    barrier: int
    read: int  # where the arguments of `ReadRequest` are
    products: int  # the kernel `experts`, and where its arguments are
    experts: int
    most_pairs: int
    d: int
    system: int


class RingPair(NamedTuple):
    """What a captured step knows of one worker."""

    requests: int  # the ring that this process writes
    replies: int  # the worker's
    received: int  # how many replies were taken in, as an int32
    asked: int  # whether one is still to come
    lost: int  # set by another thread: none will come
    request_bytes: int  # sums over the step, without headers
    reply_bytes: int
    waited_ns: int
    compute_ns: int  # as the worker says
    mean_ns: int  # of the last waits


class RingStep(NamedTuple):
    """What all layers of a captured step share."""

    router: int
    epoch: int
    step: int
    limit_ns: int  # how long a reply may take
    void: int  # whether a worker did not answer, or with something else


class RingAsk(NamedTuple):
    """Lay out each worker's request of a planned dispatch in the ring to it, and say that it is there; in a void step,
    nothing."""

    pairs: int  # `RingPair` [workers]
    step: int  # `RingStep`
    n_workers: int
    layer: int
    x: int
    x_stride: int
    d: int
    first: int  # of the plan
    first_row: int
    row: int
    token: int
    expert: int
    system: int


class RingCollect(NamedTuple):
    """Wait for each asked worker's reply, check it, and note where its rows are; in a void step they are all spare."""

    pairs: int
    step: int
    n_workers: int
    d: int
    first: int  # of the plan
    parts: int  # int64 [workers, 2], as `WeightedSum` reads it
    spare: int  # zeros, as many as all replies together have
    ring_bytes: int
    system: int


class RunGraph(NamedTuple):
    n_calls: int
    calls: int  # int64 [calls, 3]: kernel, its arguments, its team
