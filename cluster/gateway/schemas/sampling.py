"""The fields that chat and text completions have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from cluster.gateway.schemas.fields import (
    Biases,
    Body,
    Count,
    Integer,
    JsonObject,
    No,
    NTop,
    Penalty,
    Stop,
    Text,
    TokenId,
    TokenIds,
    at_most,
)
from cluster.gateway.schemas.outputs import ResponseFormat, StructuredOutputs
from cluster.router import limits


class StreamOptions(Body):
    include_usage: Annotated[bool | None, Field(description="Send one more chunk, with the usage, at the end")] = None
    include_obfuscation: No | None = None
    continuous_usage_stats: Annotated[bool | None, Field(description="Send the usage so far with every chunk")] = None


class SamplingFields(Body):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(description="The id that /v1/models shows")]
    temperature: Annotated[
        Annotated[float, Field(ge=0, le=limits.MAX_TEMPERATURE)] | None,
        Field(description="0: greedy; default: the checkpoint's, else 1"),
    ] = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[
        Annotated[Integer, Field(ge=-1, le=2**31 - 1)] | None,
        Field(description="-1 or 0: all tokens; default: the checkpoint's, else 0"),
    ] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=limits.MIN_REPETITION_PENALTY, le=limits.MAX_PENALTY)] | None = None
    logit_bias: Biases | None = None
    seed: Annotated[
        Annotated[Integer, Field(ge=-(2**63), le=2**63)] | None,
        Field(description="The same request with the same seed gives the same answer; sequence i of n uses seed + i"),
    ] = None
    n: Annotated[Integer, Field(ge=1, le=limits.MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=limits.MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=limits.MAX_STOP_IDS // 2)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[Count | None, Field(description="No end and no stop before as many tokens")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[JsonObject | str | None, Field(description="As structured_outputs.json")] = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Stop], Field(fail_fast=True, min_length=1, max_length=1000)] | None = None
    guided_grammar: Text | None = None
    allowed_token_ids: Annotated[
        Annotated[TokenIds, Field(min_length=1)] | None,
        Field(description="No other token is sampled"),
    ] = None
    skip_special_tokens: Annotated[bool | None, Field(description="false: their names are part of the text")] = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Annotated[
        Annotated[list[Stop], Field(max_length=limits.MAX_BAD_WORDS, fail_fast=True)] | None,
        Field(description="Texts that are not written"),
    ] = None
    prompt_logprobs: Annotated[NTop | None, Field(description="Scores of the prompt's tokens; not in streams")] = None
    return_token_ids: bool | None = None
    return_routing: Annotated[
        bool | None, Field(description="Say which experts each token of the answer went through, layer by layer")
    ] = None
    return_tokens_as_token_ids: Annotated[bool | None, Field(description="In log-probabilities, for names")] = None
    truncate_prompt_tokens: Annotated[
        Annotated[Integer, Field(ge=1, le=2**31 - 1)] | None, Field(description="Keep so many of the prompt")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Field(description="Where a prompt is cut; default left: its end is kept")
    ] = None
    priority: Annotated[
        Annotated[Integer, Field(ge=-(2**31), le=2**31 - 1)] | None, Field(description="A lower one is served earlier")
    ] = None
    request_id: Annotated[Annotated[str, Field(max_length=256)] | None, Field(description="Accepted, not used")] = None
    cache_salt: Annotated[
        Annotated[str, Field(max_length=256)] | None,
        Field(description="Prompts share cached work with those of the same salt alone"),
    ] = None
    user: str | None = None
    metadata: Annotated[
        Annotated[dict[str, str], BeforeValidator(at_most(64, "entries"))] | None,
        Field(description="Accepted and not used, as `user` is"),
    ] = None
