"""Generation messages <-> the plain types of `cluster.router.params`. Nothing else knows both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import cast, overload

import numpy as np

from cluster.errors import RequestError
from cluster.router.params import Finish, Routing, SamplingParams, StepOutput, TokenLogprobs
from cluster.router.queue import Queue
from workers.pb import generation_pb2 as pb

SERVICE = "expertmesh.generation.v1.Generation"
STREAM_METHOD = f"/{SERVICE}/Stream"
# Prompts and their log-probabilities are the largest messages: 32k tokens with 20 candidates each take 8 MB.
MESSAGE_BYTES = 64 * 1024 * 1024
#: In a call's metadata: the router that the gateway awaits. An address may have been another's before.
ROUTER_KEY = "expertmesh-router"

# Sampling has the fields of SamplingParams, one for one.
_SCALARS = tuple(
    field.name
    for field in fields(SamplingParams)
    if field.name not in {"logit_bias", "stop_ids", "logprobs", "prompt_logprobs", "allowed_ids", "bad_words"}
)


def encode_submit(
    request_id: str, prompt_ids: Sequence[int], params: SamplingParams, emitted_ids: Sequence[int] = ()
) -> pb.Command:
    sampling = pb.Sampling(
        **{name: getattr(params, name) for name in _SCALARS},
        logit_bias=params.logit_bias,
        stop_ids=params.stop_ids,
        allowed_ids=params.allowed_ids,
        bad_words=[pb.TokenIds(ids=word) for word in params.bad_words],
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )
    submit = pb.Submit(request_id=request_id, prompt_ids=prompt_ids, emitted_ids=emitted_ids, sampling=sampling)
    return pb.Command(submit=submit)


def encode_cancel(request_id: str) -> pb.Command:
    return pb.Command(cancel=pb.Cancel(request_id=request_id))


def decode_sampling(sampling: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        **{name: getattr(sampling, name) for name in _SCALARS},
        logit_bias=dict(sampling.logit_bias),
        stop_ids=tuple(sampling.stop_ids),
        allowed_ids=tuple(sampling.allowed_ids),
        bad_words=tuple(tuple(word.ids) for word in sampling.bad_words),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
    )


def encode_queue(queue: Queue) -> pb.Queue:
    return pb.Queue(
        seats=queue.seats, places=queue.places, max_wait_s=queue.max_wait_s, pace_s=queue.pace_s, open=queue.open
    )


def decode_queue(queue: pb.Queue) -> Queue:
    return Queue(queue.seats, queue.places, queue.max_wait_s, queue.pace_s, dict(queue.open))


def merge_output(message: pb.Output, output: StepOutput) -> None:
    """Append what one more step gave a request to the message that is on its way."""
    message.token_ids.extend(output.token_ids)
    if output.cached_tokens:
        message.cached_tokens = output.cached_tokens
    if output.logprobs:
        message.logprobs.extend([_encode_logprobs(entry) for entry in output.logprobs])
    if output.prompt_logprobs is not None:
        message.prompt_logprobs.extend([_encode_logprobs(entry) for entry in output.prompt_logprobs])
    if output.routing is not None:
        _merge_routing(message.routing, output.routing)
    if output.finish is not None:
        message.finish = output.finish
        if output.finish == "error":
            message.refusal.CopyFrom(encode_refusal(output.error or internal_error()))


def output_bytes(output: StepOutput) -> int:
    """About what `merge_output` adds on the wire; rather too much than too little."""
    entries = output.logprobs if output.prompt_logprobs is None else (*output.logprobs, *output.prompt_logprobs)
    routing = 0 if output.routing is None else output.routing.experts_NLK.nbytes
    return 64 + routing + 5 * len(output.token_ids) + sum(16 + 13 * len(entry.top) if entry else 2 for entry in entries)


def decode_output(message: pb.Output) -> StepOutput:
    """The inverse of `merge_output`; the refusal of a message whose `finish` is "error" is read apart."""
    prompt_logprobs = _PromptScores(message.prompt_logprobs) if message.prompt_logprobs else None
    return StepOutput(
        message.request_id,
        tuple(message.token_ids),
        tuple([_decode_logprobs(entry) for entry in message.logprobs]) if message.logprobs else (),
        prompt_logprobs,
        cast(Finish, message.finish) if message.finish else None,
        cached_tokens=message.cached_tokens,
        routing=_decode_routing(message.routing) if message.HasField("routing") else None,
    )


class _PromptScores(Sequence[TokenLogprobs | None]):
    """Scores of a prompt's tokens, each decoded when it is looked at: those of a long prompt take a second in all."""

    def __init__(self, encoded: Sequence[pb.Logprobs]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, i: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[TokenLogprobs | None]: ...
    def __getitem__(self, i: int | slice) -> TokenLogprobs | Sequence[TokenLogprobs | None] | None:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        encoded = self._encoded[i]
        return None if i in (0, -len(self)) else _decode_logprobs(encoded)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)


def _merge_routing(message: pb.Routing, routing: Routing) -> None:
    """Those of one step follow those of the step before."""
    if not message.experts:
        message.start = routing.start
        _, message.layers, message.choices = routing.experts_NLK.shape
    message.experts += routing.experts_NLK.astype("<i2", copy=False).tobytes()


def _decode_routing(message: pb.Routing) -> Routing:
    ids = np.frombuffer(message.experts, "<i2").reshape(-1, message.layers, message.choices)
    return Routing(message.start, ids)


def encode_refusal(error: RequestError) -> pb.Refusal:
    return pb.Refusal(
        code=error.code,
        message=str(error),
        param=error.param or "",
        status=error.status,
        retry_after_s=error.retry_after_s or 0,
    )


def decode_refusal(refusal: pb.Refusal) -> RequestError:
    return RequestError(
        refusal.message,
        code=refusal.code,
        param=refusal.param or None,
        status=refusal.status,
        retry_after_s=refusal.retry_after_s or None,
    )


def internal_error() -> RequestError:
    """What a client is told of a failure of ours; the log says which."""
    return RequestError("The model could not go on with this request", code="internal_error", status=500)


def _encode_logprobs(entry: TokenLogprobs | None) -> pb.Logprobs:
    if entry is None:
        return pb.Logprobs()
    return pb.Logprobs(
        logprob=entry.logprob,
        top_ids=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def _decode_logprobs(message: pb.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=True)))
