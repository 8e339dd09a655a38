"""100,000 damaged requests: each is refused, or answered rightly for what it says now.

Catches an index that is used unchecked, a kernel and a parser that disagree on what is right, and a hang.
"""

from __future__ import annotations

import random

import torch

from tests.contract.model import Model
from workers import wire
from workers.errors import WireError
from workers.transport.batcher import Batcher
from workers.wire import HEADER_BYTES

MODEL = Model()
N_FRAMES = 100_000
SLOTS = [(layer, expert) for layer in range(2) for expert in range(5)]  # expert 5 is not held


def whole(seed: int) -> bytes:
    """A request of one to four tokens, each with two experts."""
    chance = random.Random(seed)
    n_tokens = chance.randint(1, 4)
    pairs = sorted((expert, token) for token in range(n_tokens) for expert in chance.sample(range(6), 2))
    expert_P, token_P = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    x_TD = torch.randn(n_tokens, 32, generator=torch.Generator().manual_seed(seed))
    tag = wire.Tag(7, 1, seed, chance.randint(0, 1), 0, 0)
    return b"".join(next(wire.request_frames(tag, x_TD, token_P, expert_P)))


def damaged(message: bytes, chance: random.Random) -> bytes:
    frame = bytearray(message)
    n_rows_end = HEADER_BYTES + 4 * 32 * wire.parse_head(message).n_tokens
    for _ in range(chance.randint(1, 3)):
        # Mostly where it matters: the header and the pairs.
        first, last = chance.choice(((0, HEADER_BYTES), (n_rows_end, len(frame)), (0, len(frame))))
        frame[chance.randrange(first, last)] = chance.choice((0, 1, 2, 5, 6, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    if chance.random() < 0.1:
        del frame[chance.randrange(len(frame)) :]
    return bytes(frame)


def test_a_damaged_request_is_refused_or_means_what_it_says() -> None:
    chance, messages = random.Random(1), [whole(seed) for seed in range(50)]
    shard = MODEL.shard(SLOTS)
    batcher = Batcher(shard)
    by_kernel = by_parser = refused = 0
    for _ in range(N_FRAMES):
        frame = memoryview(damaged(chance.choice(messages), chance))
        reply = batcher.answer(frame)
        try:
            header = wire.parse_head(frame)
            if header.payload_bytes != len(frame) - HEADER_BYTES:
                raise WireError("another length than announced")
            request = wire.request(header, frame[HEADER_BYTES:])
        except WireError:
            assert reply is None, "the kernel took what the parser refuses"
            refused += 1
            continue
        if reply is not None:
            answer = wire.parse_head(reply)
            assert (answer.kind, answer.tag) == (wire.REPLY, header.tag)
            y_PD = torch.frombuffer(bytearray(reply[HEADER_BYTES:]), dtype=torch.float32).view(-1, 32)
            by_kernel += 1
        else:
            result = batcher.respond(header, request, lambda: True)
            if not isinstance(result, tuple):
                assert isinstance(result, str)
                refused += 1
                continue
            y_PD = result[0]
            by_parser += 1
        assert y_PD.shape == (header.n_pairs, header.width)
        assert_right(header, request, y_PD)
    assert min(by_kernel, refused) > N_FRAMES / 100, (by_kernel, by_parser, refused)
    assert batcher.rows > 0


def assert_right(header: wire.Header, request: wire.Request, y_PD: torch.Tensor) -> None:
    """A pair or two by the definition: y = w2 (silu(w1 x) * (w3 x))."""
    for at in {0, len(y_PD) - 1}:
        weights = WEIGHTS[header.tag.layer, int(request.expert_P[at])]
        x_D = request.x_TD[int(request.token_P[at])]
        expected_D = weights.w2_DF @ (torch.nn.functional.silu(weights.w1_FD @ x_D) * (weights.w3_FD @ x_D))
        scale = float(expected_D.abs().max())
        if scale < 1e6:  # a row that was damaged may be as large as floats are
            torch.testing.assert_close(y_PD[at], expected_D, atol=1e-4 * max(scale, 1.0), rtol=1e-3)


WEIGHTS = {slot: MODEL.weights(*slot) for slot in SLOTS}
