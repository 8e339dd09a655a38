"""Requests answered by one kernel: a reply that differs from the usual way's, rows read from beyond the message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.unit.workers.test_shard import spec, weights
from workers import wire
from workers.kernels.cpu.library import usable
from workers.shard import ExpertShard
from workers.weights import format_of
from workers.wire import Tag

pytestmark = pytest.mark.skipif(not usable(), reason="the CPU kernels cannot be built here")

TAG = Tag(router=2**64 - 1, epoch=7, step=2**40, layer=1, part=3, attempt=2)


def shard(stored: torch.dtype = torch.float32, hidden: int = 37, experts: int = 5) -> ExpertShard:
    torch.manual_seed(0)
    model = spec(hidden=hidden, experts=experts)
    made = ExpertShard(model, "cpu", torch.float32, format_of(stored))
    for layer in range(2):
        for expert in range(experts):
            made.load(layer, expert, weights(model))
    return made


def message(x_TD: torch.Tensor, pairs: list[tuple[int, int]], tag: Tag = TAG) -> bytearray:
    """A request for (token, expert) pairs."""
    token_P, expert_P = (torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True))
    return bytearray(b"".join(next(wire.request_frames(tag, x_TD, token_P, expert_P))))


def usual(held: ExpertShard, request: bytes) -> bytes:
    """The reply of whoever parses the request first."""
    header = wire.parse_head(request)
    rows = wire.request(header, memoryview(request)[wire.HEADER_BYTES :])
    y_PD = held.forward(header.tag.layer, *rows)
    return b"".join(next(wire.reply_frames(header.tag, header.n_tokens, y_PD, 0)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 0)],
        [(0, 4)],
        [(0, 1), (0, 3)],
        [(2, 0), (0, 2), (1, 2), (0, 4)],
        [(token, expert) for expert in range(5) for token in range(32)],
        [(token, 3) for token in range(32)],
    ],
    ids=["first", "last", "two", "mixed", "all", "one_expert"],
)
def test_the_reply_is_that_of_the_usual_way(pairs: list[tuple[int, int]], stored: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        held = shard(stored)
        request = message(torch.randn(1 + max(token for token, _ in pairs), 37), pairs)
        rows = [slot.rows for slot in held.slots]
        reply = held.answer(memoryview(request))
        assert reply is not None
        counted = [slot.rows - n for slot, n in zip(held.slots, rows, strict=True)]
        assert counted == [sum(e == slot.expert and slot.layer == 1 for _, e in pairs) for slot in held.slots]
        assert bytes(reply) == usual(held, bytes(request))
    finally:
        torch.set_num_threads(before)


def test_a_message_may_lie_at_any_address() -> None:
    held, request = shard(), bytes(message(torch.randn(3, 37), [(0, 1), (2, 1), (1, 3)]))
    expected = usual(held, request)
    for shift in range(8):
        reply = held.answer(memoryview(bytes(shift) + request)[shift:])
        assert reply is not None
        assert bytes(reply) == expected


def changed(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(request: bytearray) -> None:
        request[at : at + len(value)] = value

    return change


def as_u32(value: int) -> bytes:
    return (value % (1 << 32)).to_bytes(4, "little")


@pytest.mark.parametrize(
    "change",
    [
        *(changed(at, b"\7") for at in range(8)),  # magic, version, kind, dtype, padding
        *(changed(32, as_u32(layer)) for layer in (2, -1)),
        *(changed(44, as_u32(n_tokens)) for n_tokens in (0, 2, 4, 33, -1)),
        *(changed(48, as_u32(n_pairs)) for n_pairs in (0, 2, 4, 1 << 20, -1)),
        *(changed(52, as_u32(width)) for width in (0, 36, 38, -1)),
        *(changed(56, as_u32(payload)) for payload in (0, 4, 1 << 30, -1)),
        changed(56, (3 * 37 * 4 + 3 * 8 + (1 << 32)).to_bytes(8, "little")),
        *(changed(72 + 3 * 37 * 4, as_u32(token)) for token in (3, -1)),
        *(changed(72 + 3 * 37 * 4 + 12 + 4, as_u32(expert)) for expert in (0, 4, 5, -1)),  # in the middle
        *(changed(72 + 3 * 37 * 4 + 12, as_u32(expert)) for expert in (-1, -(1 << 31))),  # the first
        *(changed(72 + 3 * 37 * 4 + 12 + 8, as_u32(expert)) for expert in (5, 1 << 30)),  # the last
    ],
)
def test_what_is_wrong_is_left_to_the_usual_way(change: Callable[[bytearray], None]) -> None:
    held, request = shard(), message(torch.randn(3, 37), [(0, 1), (2, 1), (1, 3)])
    assert held.answer(memoryview(request)) is not None
    rows = [slot.rows for slot in held.slots]
    change(request)
    assert held.answer(memoryview(request)) is None
    assert [slot.rows for slot in held.slots] == rows


@pytest.mark.parametrize("n_bytes", [0, 1, 71, 72, 100, -1])
def test_what_is_cut_off_is_left_to_the_usual_way(n_bytes: int) -> None:
    held, request = shard(), message(torch.randn(3, 37), [(0, 1), (2, 1), (1, 3)])
    assert held.answer(memoryview(request)[:n_bytes]) is None


def test_an_expert_that_is_not_held_is_left_to_the_usual_way() -> None:
    held, request = shard(), message(torch.randn(3, 37), [(0, 1), (2, 1), (1, 3)])
    held.unload(1, 3)
    assert held.answer(memoryview(request)) is None
    held.unload(0, 1)
    other = message(torch.randn(3, 37), [(0, 1), (2, 1), (1, 2)])
    assert held.answer(memoryview(other)) is not None, "the layer asked has it"


def test_many_rows_are_left_to_the_usual_way() -> None:
    held = shard()
    assert held.answer(memoryview(message(torch.randn(33, 37), [(0, 0)]))) is None
    assert held.answer(memoryview(message(torch.randn(2, 37), [(0, 0)] * 161))) is None


def test_rows_of_other_dtypes_are_left_to_the_usual_way() -> None:
    held = ExpertShard(spec(), "cpu", torch.bfloat16)
    assert held.answer(memoryview(message(torch.randn(1, 37).bfloat16(), [(0, 0)]))) is None
    assert shard().answer(memoryview(message(torch.randn(1, 37).bfloat16(), [(0, 0)]))) is None


def test_a_stamp_says_how_long_it_took() -> None:
    held = shard()
    reply = held.answer(memoryview(message(torch.randn(3, 37), [(0, 1), (2, 1), (1, 3)])))
    assert reply is not None
    assert wire.stamp(reply, 2**63 + 5) == 3
    assert wire.parse_head(reply).compute_ns == 2**63 + 5
