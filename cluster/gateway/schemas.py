"""Request bodies, strict: a field of another type, out of its range or unknown is refused, never ignored.

`NEUTRAL` fields are there because clients send them with the only value that is served; another value is refused as
unsupported. `UNSUPPORTED` are the names that other servers know and this one does not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cluster.router import limits


def _whole(text: str) -> str:
    """JSON can write half a surrogate pair, which is no character."""
    if not text.isascii():
        text.encode()  # UnicodeEncodeError is a ValueError, as pydantic wants it
    return text


def _integral(value: Any) -> Any:
    """To JSON 2.0 is an integer, as it is to a client whose language has only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: Any) -> Any:
    """To Python 0 is False; to JSON it is not."""
    if not isinstance(value, bool):
        raise ValueError("must be false")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be 1")
    return value


Text = Annotated[str, AfterValidator(_whole)]
Integer = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[Integer, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARACTERS)]
BiasKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-limits.MAX_BIAS, le=limits.MAX_BIAS)]
Biases = Annotated[
    dict[BiasKey, Bias],
    Field(max_length=limits.MAX_BIAS_ENTRIES, json_schema_extra={"additionalProperties": False}),
]
Penalty = Annotated[float, Field(ge=-limits.MAX_PENALTY, le=limits.MAX_PENALTY)]
NTop = Annotated[Integer, Field(ge=0, le=limits.MAX_LOGPROBS)]
MaxTokens = Annotated[Integer, Field(ge=1, le=2**31 - 1)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
One = Annotated[Literal[1], BeforeValidator(_number)]
Empty = Annotated[list[Any], Field(max_length=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    include_usage: Annotated[bool | None, Field(description="Send one more chunk, with the usage, at the end")] = None
    include_obfuscation: No | None = None


class SamplingFields(Strict):
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
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_IDS // 2)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[Count | None, Field(description="No end and no stop before as many tokens")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str] | None, Field(description="Accepted and not used, as `user` is")] = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"], Field(description="`developer` is the same as `system`")
    ]
    content: Text | list[TextPart]
    name: Text | None = None
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[
        MaxTokens | None, Field(description="Default: the checkpoint's, else what the context has room for")
    ] = None
    max_completion_tokens: Annotated[MaxTokens | None, Field(description="The newer name of max_tokens")] = None
    logprobs: bool | None = None
    top_logprobs: NTop | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: No | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_Ids = Annotated[list[TokenId], Field(min_length=1)]
_Prompts = Field(min_length=1, max_length=limits.MAX_CHOICES)
Prompt = Text | Annotated[list[Text], _Prompts] | _Ids | Annotated[list[_Ids], _Prompts]


class CompletionRequest(SamplingFields):
    prompt: Annotated[Prompt, Field(description="One text, several, token ids, or several lists of token ids")]
    max_tokens: Annotated[Count | None, Field(description="Default 16; 0 only with echo")] = None
    echo: Annotated[bool | None, Field(description="Put the prompt, with logprobs if asked for, before the text")] = (
        None
    )
    logprobs: NTop | None = None
    best_of: One | None = None
    suffix: Literal[""] | None = None


class TokenizeRequest(Strict):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: Annotated[bool | None, Field(description="Default: true for a prompt, false for messages")] = (
        None
    )
    add_generation_prompt: Annotated[bool, Field(description="Of messages")] = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]


_NEUTRAL = """
    annotations audio best_of function_call functions include_obfuscation modalities refusal response_format
    service_tier store suffix tool_calls tool_choice tools
"""
_OPENAI = """
    audio best_of echo functions moderation prediction prompt_cache_options prompt_cache_retention reasoning_effort
    suffix tools verbosity web_search_options
"""
_OTHERS = """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template chat_template_kwargs
    continue_final_message documents early_stopping ebnf guided_choice guided_grammar guided_json guided_regex
    include_reasoning include_stop_str_in_output json_schema kv_transfer_params length_penalty logits_processors
    lora_path mm_processor_kwargs priority prompt_embeds prompt_logprobs regex return_token_ids
    return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens stop_regex structured_outputs
    thinking_token_budget truncate_prompt_tokens use_beam_search vllm_xargs
"""
NEUTRAL = frozenset(_NEUTRAL.split())
UNSUPPORTED = frozenset(_OPENAI.split() + _OTHERS.split())
