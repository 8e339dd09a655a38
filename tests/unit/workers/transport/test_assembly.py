"""Requests come out of the frames of a stream as they went in, whatever their sizes; nonsense is refused."""

from __future__ import annotations

import pytest
import torch

from workers import wire
from workers.errors import WireError
from workers.transport.assembly import Assembly
from workers.wire import FRAME_BYTES, Tag

TAG = Tag(1, 2, 3, 4, 5, 6)


def frames(rows: int) -> list[bytes]:
    pairs_P = torch.arange(rows, dtype=torch.int32)
    return list(wire.request_frames(TAG, torch.randn(rows, 512), pairs_P, torch.zeros_like(pairs_P)))


def test_requests_of_one_and_of_many_frames_follow_each_other() -> None:
    assembly = Assembly()
    for rows in (1, 2000, 3, 500):
        sent = frames(rows)
        for frame in sent[:-1]:
            assert assembly.add(frame) is None
            assert not assembly.is_whole
        complete = assembly.add(sent[-1])
        assert complete is not None
        assert assembly.is_whole
        header, request = complete
        assert (header.tag, header.n_pairs) == (TAG, rows)
        again = wire.request_frames(TAG, request.x_TD, request.token_P, request.expert_P)
        assert list(again) == sent


@pytest.mark.parametrize("second", [b"", b"short", bytes(FRAME_BYTES + 1)])
def test_a_frame_of_another_length_is_refused(second: bytes) -> None:
    assembly = Assembly()
    assembly.add(frames(2000)[0])
    with pytest.raises(WireError, match="frame"):
        assembly.add(second)


def test_what_is_no_request_is_refused() -> None:
    reply = next(wire.reply_frames(TAG, 1, torch.ones(1, 8), 0))
    with pytest.raises(WireError, match="only requests"):
        Assembly().add(reply)
