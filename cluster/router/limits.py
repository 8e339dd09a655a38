"""What a request may ask for. The gateway's schemas state these limits; the router enforces them again."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import RequestError
from cluster.router.params import SamplingParams

MAX_CHOICES = 128  # sequences of one request: n, times the prompts
MAX_LOGPROBS = 20  # likeliest tokens per position
MAX_STOPS = 16  # stop strings
MAX_STOP_CHARACTERS = 512  # of one stop string
MAX_STOP_IDS = 64
MAX_BAD_WORDS = 128
MAX_BIAS_ENTRIES = 1024
MAX_BIAS = 100.0
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0  # presence and frequency, either sign; repetition, from MIN_REPETITION_PENALTY
MIN_REPETITION_PENALTY = 0.01
MAX_GRAMMAR_CHARACTERS = 1 << 18


def check(prompt_ids: Sequence[int], params: SamplingParams, *, vocab_size: int, max_context: int) -> None:
    """Raise RequestError naming the field that is out of its range."""
    room = max_context - len(prompt_ids)
    if not prompt_ids:
        raise _invalid("prompt", "is empty")
    if params.max_tokens > room:
        raise RequestError(
            f"This model's maximum context length is {max_context} tokens; you asked for {len(prompt_ids)} in the "
            f"prompt and {params.max_tokens} in the answer",
            code="context_length_exceeded",
        )
    if max(prompt_ids) >= vocab_size or min(prompt_ids) < 0:  # after their number, which bounds the time it takes
        raise _invalid("prompt", f"has a token id out of vocabulary (0..{vocab_size - 1})")
    scores_only = params.prompt_logprobs is not None  # then an empty answer makes sense
    _check_range("max_tokens", params.max_tokens, 0 if scores_only else 1, max_context)
    _check_range("min_tokens", params.min_tokens, 0, params.max_tokens)
    _check_range("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _check_range("top_k", params.top_k, 0, 2**31 - 1)
    _check_range("top_p", params.top_p, 0.0, 1.0)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("repetition_penalty", params.repetition_penalty, MIN_REPETITION_PENALTY, MAX_PENALTY)
    _check_range("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("seed", params.seed, 0, 2**64 - 1)
    _check_range("logprobs", params.logprobs or 0, 0, MAX_LOGPROBS)
    _check_range("prompt_logprobs", params.prompt_logprobs or 0, 0, MAX_LOGPROBS)
    _check_ids("stop_token_ids", params.stop_ids, MAX_STOP_IDS, vocab_size)
    _check_ids("logit_bias", tuple(params.logit_bias), MAX_BIAS_ENTRIES, vocab_size)
    if len(params.bad_words) > 2 * MAX_BAD_WORDS:
        raise _invalid("bad_words", f"has more than {MAX_BAD_WORDS} entries")
    for word in params.bad_words:
        _check_ids("bad_words", word, max_context, vocab_size)
    _check_ids("allowed_token_ids", params.allowed_ids, vocab_size, vocab_size)
    if len(params.grammar) > MAX_GRAMMAR_CHARACTERS:
        raise _invalid("grammar", f"has {len(params.grammar)} characters; at most {MAX_GRAMMAR_CHARACTERS} are allowed")
    for bias in params.logit_bias.values():
        _check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)


def check_emitted(emitted_ids: Sequence[int], params: SamplingParams, *, vocab_size: int) -> None:
    """Raise RequestError unless `emitted_ids` can be the beginning of the answer of such a request."""
    _check_ids("emitted_ids", emitted_ids, params.max_tokens, vocab_size)


def _check_range(param: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is not either
        raise _invalid(param, f"must be between {low} and {high}, not {value}")


def _check_ids(param: str, ids: Sequence[int], most: int, vocab_size: int) -> None:
    if len(ids) > most:
        raise _invalid(param, f"has {len(ids)} entries; at most {most} are allowed")
    if any(not 0 <= token_id < vocab_size for token_id in ids):
        raise _invalid(param, f"has a token id out of vocabulary (0..{vocab_size - 1})")


def _invalid(param: str, what: str) -> RequestError:
    return RequestError(f"'{param}' {what}", code="invalid_value", param=param)
