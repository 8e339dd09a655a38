"""Request bodies: a field of another type or out of its range is refused; null is the same as absent.

`NEUTRAL` fields are there because clients send them with the only value that is served; another value is refused as
unsupported. `UNSUPPORTED` are the names that other servers know and this one does not: refused by name, unless null.
Any other unknown field is ignored, or refused with `strict_fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def at_most(n: int, what: str) -> Callable[[Any], Any]:
    """Look at the length of a list or an object before anything in it."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > n:
            raise ValueError(f"{len(value)} {what}; at most {n} are allowed")
        return value

    return check


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
    BeforeValidator(at_most(limits.MAX_BIAS_ENTRIES, "entries")),
]
Penalty = Annotated[float, Field(ge=-limits.MAX_PENALTY, le=limits.MAX_PENALTY)]
NTop = Annotated[Integer, Field(ge=0, le=limits.MAX_LOGPROBS)]
MaxTokens = Annotated[Integer, Field(ge=1, le=2**31 - 1)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
One = Annotated[Literal[1], BeforeValidator(_number)]
Empty = Annotated[list[Any], Field(max_length=0)]
JsonObject = dict[str, Any]
FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
MAX_MESSAGES = 4096
MAX_TOOLS = 256


class Body(BaseModel):
    """`unknown`: names of fields that this server does not know, here and in what it holds."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    def unknown(self) -> Iterator[str]:
        yield from (name for name, value in (self.model_extra or {}).items() if value is not None)
        for value in self.__dict__.values():
            for item in value if isinstance(value, list) else (value,):
                if isinstance(item, Body):
                    yield from item.unknown()


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
        Annotated[list[TokenId], Field(fail_fast=True, min_length=1)] | None,
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
    return_tokens_as_token_ids: Annotated[bool | None, Field(description="In log-probabilities, for names")] = None
    truncate_prompt_tokens: Annotated[
        Annotated[Integer, Field(ge=1, le=2**31 - 1)] | None, Field(description="Keep the last so many of the prompt")
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


class TextPart(Body):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: Text = ""


class FunctionCall(Body):
    name: Text
    arguments: Annotated[Text | None, Field(description="A JSON object as text")] = None


class ToolCall(Body):
    id: Text | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(Body):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        Field(description="`developer` is the same as `system`, `function` the older name of `tool`"),
    ]
    content: Annotated[
        Text | Annotated[list[TextPart], Field(fail_fast=True)] | None,
        Field(description="null: an assistant that only calls"),
    ] = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    audio: None = None


Messages = Annotated[
    list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(at_most(MAX_MESSAGES, "messages"))
]


class Function(Body):
    name: FunctionName
    description: Text | None = None
    parameters: Annotated[JsonObject | None, Field(description="A JSON schema of an object; default: any")] = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an answer must follow; exactly one."""

    json_: Annotated[JsonObject | str | None, Field(alias="json", description="A JSON schema")] = None
    regex: Text | None = None
    choice: Annotated[list[Stop], Field(fail_fast=True, min_length=1, max_length=1000)] | None = None
    grammar: Annotated[Text | None, Field(description="A context-free grammar in Lark's or GBNF's syntax")] = None
    json_object: bool | None = None


class ChatRequest(SamplingFields):
    messages: Messages
    max_tokens: Annotated[
        MaxTokens | None, Field(description="Default: the checkpoint's, else what the context has room for")
    ] = None
    max_completion_tokens: Annotated[MaxTokens | None, Field(description="The newer name of max_tokens")] = None
    logprobs: bool | None = None
    top_logprobs: NTop | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: one call at most")] = None
    functions: Annotated[list[Function], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    add_generation_prompt: Annotated[bool | None, Field(description="Begin the assistant's turn; default true")] = None
    continue_final_message: Annotated[bool | None, Field(description="Go on with the last message's text")] = None
    add_special_tokens: bool | None = None
    echo: Annotated[bool | None, Field(description="Put the last message before the answer")] = None
    chat_template_kwargs: Annotated[JsonObject | None, Field(description="More names for the chat template")] = None
    documents: Annotated[
        Annotated[list[JsonObject], Field(max_length=1024, fail_fast=True)] | None,
        Field(description="For templates that know documents"),
    ] = None
    include_reasoning: Annotated[bool | None, Field(description="false: reasoning is not part of the answer")] = None
    service_tier: Literal["auto", "default"] | None = None
    store: No | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
_Prompts = Field(min_length=1, max_length=limits.MAX_CHOICES, fail_fast=True)
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


class TokenizeRequest(Body):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool | None, Field(description="Default: true for a prompt, false for messages")] = (
        None
    )
    add_generation_prompt: Annotated[bool, Field(description="Of messages")] = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


_NEUTRAL = """
    audio best_of include_obfuscation modalities service_tier store suffix
"""
_OPENAI = """
    audio best_of moderation prediction suffix web_search_options
"""
_OTHERS = """
    chat_template early_stopping ebnf guided_decoding_backend json_schema kv_transfer_params length_penalty
    logits_processors lora_path mm_processor_kwargs prompt_embeds regex stop_regex structural_tag
    thinking_token_budget use_beam_search vllm_xargs
"""
NEUTRAL = frozenset(_NEUTRAL.split())
UNSUPPORTED = frozenset(_OPENAI.split() + _OTHERS.split())
