"""Weights of an expert from a worker that holds it: what both ends say, in pieces that carry their checksum.

Legend: D hidden, F ffn.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import grpc
import torch
from torch import Tensor

from workers import wire
from workers.checkpoint import ExpertWeights
from workers.errors import ExpertNotHeld, WireError, WorkerLost
from workers.pb import experts_pb2 as pb
from workers.shard import ExpertShard
from workers.transport.grpc.credentials import Credentials, Metadata
from workers.transport.grpc.handshake import WEIGHTS_METHOD, Hello
from workers.transport.grpc.serving import channel_options, open_channel, text_values
from workers.wire import FRAME_BYTES

_WHAT = "expertmesh-weights"
_PIECE_BYTES = 1 << 20
_CRC_BYTES = 4
_TIMEOUT_S = 60.0  # for one expert


def words(shard: ExpertShard, layer: int, expert: int) -> tuple[Metadata, list[Tensor]]:
    """What a worker says of the weights it is asked for, and the tensors on the CPU: w13 [2F, D], w2 [D, F].

    Raises ExpertNotHeld, also for weights that are not as the checkpoint has them: another GPU's format is its own.
    """
    matrices = shard.weights(layer).get(expert) if layer < shard.n_layers else None
    if matrices is None or any(matrix.scale_N is not None for matrix in matrices):
        raise ExpertNotHeld(layer, (expert,))
    tensors = [matrix.values_ND.cpu().contiguous() for matrix in matrices]
    what = [[str(tensor.dtype).removeprefix("torch."), *tensor.shape] for tensor in tensors]
    return ((_WHAT, json.dumps(what)),), tensors


async def pieces(tensors: list[Tensor]) -> AsyncIterator[bytes]:
    """The frames of `tensors`."""
    for tensor in tensors:
        content = wire.raw(tensor)
        for at in range(0, len(content), _PIECE_BYTES):
            piece = content[at : at + _PIECE_BYTES]
            yield zlib.crc32(piece).to_bytes(_CRC_BYTES, "little") + piece


class PeerWeights:
    """Asks other workers for experts. For one thread; `close` ends its connections."""

    def __init__(self, worker: str, model: str, credentials: Credentials) -> None:
        """worker: who this is. model: `Checkpoint.fingerprint`."""
        self._hello = Hello("", worker, model)
        self._credentials = credentials
        self._channels: dict[str, grpc.Channel] = {}

    def fetch(
        self, peer: str, address: str, layer: int, expert: int, ffn_size: int, hidden_size: int, dtype: torch.dtype
    ) -> ExpertWeights:
        """The weights of `(layer, expert)` from `peer`.

        Raises WorkerLost where it does not give them, WireError where what came is not what was asked for.
        """
        f, d = ffn_size, hidden_size
        w13_2FD, w2_DF = torch.empty(2 * f, d, dtype=dtype), torch.empty(d, f, dtype=dtype)
        hello = replace(self._hello, worker=peer)
        method: Any = self._channel(address).unary_stream(WEIGHTS_METHOD, pb.WeightsRequest.SerializeToString)
        call = method(
            pb.WeightsRequest(layer=layer, expert=expert),
            metadata=(*self._credentials.metadata, *hello.metadata),
            timeout=_TIMEOUT_S,
        )
        try:
            _check(text_values(call.initial_metadata()), w13_2FD, w2_DF)
            for tensor in (w13_2FD, w2_DF):
                _fill(wire.raw(tensor), call)
            if next(call, None) is not None:
                raise WireError(f"{peer} sent more than the weights of layer {layer}, expert {expert}")
        except grpc.RpcError as error:
            reason = f"{call.details()}"
            raise WorkerLost(peer, f"gave no weights of layer {layer}, expert {expert}: {reason}") from error
        finally:
            call.cancel()
        return ExpertWeights(w1_FD=w13_2FD[:f], w2_DF=w2_DF, w3_FD=w13_2FD[f:])

    def close(self) -> None:
        """End every connection."""
        while self._channels:
            self._channels.popitem()[1].close()

    def _channel(self, address: str) -> grpc.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._credentials, channel_options(FRAME_BYTES))
        return self._channels[address]


def _check(said: Mapping[str, str], *awaited: Tensor) -> None:
    wanted = [[str(tensor.dtype).removeprefix("torch."), *tensor.shape] for tensor in awaited]
    try:
        given = json.loads(said.get(_WHAT, "null"))
    except ValueError:
        given = None
    if given is not None and given != wanted:
        raise WireError(f"weights {given}, awaited: {wanted}")


def _fill(target: memoryview, frames: Any) -> None:
    at = 0
    while at < len(target):
        frame = memoryview(next(frames, b""))
        piece = frame[_CRC_BYTES:]
        if not len(piece) or len(piece) > len(target) - at:
            raise WireError(f"a piece of {len(piece)} bytes where {len(target) - at} are left")
        if zlib.crc32(piece) != int.from_bytes(frame[:_CRC_BYTES], "little"):
            raise WireError("a piece of weights was damaged on its way")
        target[at : at + len(piece)] = piece
        at += len(piece)
