"""A request's sampling fields as SamplingParams."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.offload import aside
from cluster.gateway.schemas.sampling import SamplingFields
from cluster.gateway.sequence_text import SequenceText
from cluster.router import limits
from cluster.router.params import SamplingParams

_SEEDS = 2**64
BadWords = tuple[tuple[int, ...], ...]
Number = TypeVar("Number", int, float)


def sampling_params(
    gateway: Gateway,
    request: SamplingFields,
    *,
    max_tokens: int,
    bad_words: BadWords,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What `request` asks of the sampling of its first sequence. Without a seed one is drawn. `bad_words`: its own.

    A field that is left out or null has the checkpoint's default, else OpenAI's.
    """
    defaults = gateway.model.defaults
    seed = request.seed if request.seed is not None else secrets.randbits(64)
    stop_ids = set(request.stop_token_ids or ())
    if not request.ignore_eos:
        stop_ids |= {token_id for token_id in gateway.tokenizer.eos_ids if token_id < gateway.model.vocab_size}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_first(request.temperature, defaults.temperature, 1.0),
        top_k=max(_first(request.top_k, defaults.top_k, 0), 0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()},
        seed=seed % _SEEDS,
        stop_ids=tuple(sorted(stop_ids)),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
        bad_words=bad_words,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        allowed_ids=tuple(request.allowed_token_ids or ()),
        routing=bool(request.return_routing),
    )


def nth(params: SamplingParams, index: int) -> SamplingParams:
    """The sampling of sequence `index` of a request for several: the same, from the seed `index` further on."""
    return replace(params, seed=(params.seed + index) % _SEEDS)


def check(gateway: Gateway, prompt_ids: list[int], params: SamplingParams, *, prompt: str, max_tokens: str) -> None:
    """The router's own check, with the names of the request's fields; the session would find the same, later."""
    try:
        limits.check(prompt_ids, params, vocab_size=gateway.model.vocab_size, max_context=gateway.model.max_context)
    except RequestError as error:
        names = {"prompt": prompt, "max_tokens": max_tokens}
        if error.code == "context_length_exceeded":
            error.param = prompt
        elif error.param in names:
            named = names[error.param]
            message = str(error).replace(f"'{error.param}'", f"'{named}'", 1)
            raise RequestError(message, code=error.code, param=named) from error
        raise


def sequence_texts(
    gateway: Gateway, request: SamplingFields, *, after_text: bool = False, special: bool
) -> Callable[[], SequenceText]:
    """Makes the text of each sequence of `request`. `after_text`: it goes on with the prompt's; `special`: special
    tokens are part of it."""
    stop = request.stop or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)

    def text() -> SequenceText:
        detokenizer = gateway.tokenizer.detokenizer(after_text=after_text, special=special)
        shows_stop = bool(request.include_stop_str_in_output)
        return SequenceText(detokenizer, stops, request.min_tokens or 0, shows_stop=shows_stop)

    return text


def _first(asked: Number | None, said: Number | None, default: Number) -> Number:
    """What is asked for, else what the checkpoint says, else `default`."""
    value = said if asked is None else asked
    return default if value is None else value


@dataclass(frozen=True, slots=True)
class Streaming:
    """Whether and how to stream: `usage` at the end, `usage_so_far` with every chunk."""

    wanted: bool
    usage: bool
    usage_so_far: bool


def streaming(request: SamplingFields) -> Streaming:
    """Raises RequestError for options of a stream without one, and for what a stream has no place for."""
    options = request.stream_options
    if options is not None and not request.stream:
        message = "'stream_options' is only allowed when 'stream' is true"
        raise RequestError(message, code="invalid_value", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        message = "'prompt_logprobs' is not allowed when 'stream' is true"
        raise RequestError(message, code="invalid_value", param="prompt_logprobs")
    if options is None:
        return Streaming(bool(request.stream), usage=False, usage_so_far=False)
    return Streaming(True, bool(options.include_usage), bool(options.continuous_usage_stats and options.include_usage))


def truncated(prompt_ids: list[int], request: SamplingFields) -> list[int]:
    """The last tokens of a prompt, or the first, where only so many are to be kept."""
    if (n := request.truncate_prompt_tokens) is None:
        return prompt_ids
    return prompt_ids[:n] if request.truncation_side == "right" else prompt_ids[-n:]


async def bad_words(gateway: Gateway, request: SamplingFields) -> BadWords:
    """The token ids of each word, as it is written at the beginning of a text and after a space."""
    texts = [text for word in request.bad_words or () for text in (word, f" {word}")]
    encoded = await aside(gateway.tokenizer.encode_all, texts, sum(map(len, texts)))
    return tuple({tuple(ids) for ids in encoded if ids})
