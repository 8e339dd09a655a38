"""Types of fields that several requests share, and what every body is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator

from cluster.gateway.schemas.known import asks_for_nothing
from cluster.router import limits

_NO_TEXT = frozenset(
    [
        "audio_url",
        "document",
        "file",
        "image",
        "image_url",
        "input_audio",
        "input_file",
        "input_image",
        "input_video",
        "video_url",
    ]
)


def _whole(text: str) -> str:
    """JSON can write half a surrogate pair, which is no character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("has half of a surrogate pair, which is no character") from error
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


def conversation(value: Any) -> Any:
    """Look at the number of messages, and of parts and calls in all of them, before anything in them."""
    if not isinstance(value, list):
        return value
    at_most(MAX_MESSAGES, "messages")(value)
    inner = (item.get(name) for item in value if isinstance(item, dict) for name in ("content", "tool_calls"))
    if (n_parts := sum(len(part) for part in inner if isinstance(part, list))) > MAX_PARTS:
        raise ValueError(f"{n_parts} parts and calls in messages; at most {MAX_PARTS} are allowed")
    return value


def _small(value: Any) -> Any:
    """What is only passed on costs time for each value in it: how many there are is counted, up to a limit."""
    n_values, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, list | dict):
            n_values += len(item)
            if n_values > MAX_VALUES:
                raise ValueError(f"holds more than {MAX_VALUES} values")
            left.extend(item if isinstance(item, list) else item.values())
    return value


def _absent(value: Any) -> Any:
    if value is not None:
        raise ValueError("is not supported")
    return value


def of_text(part: Any) -> Any:
    """Look at what a part of a message is before its fields."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _NO_TEXT:
        raise ValueError(f"is of type '{kind}'; this model reads text alone")
    return part


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
MAX_TOKEN_ID = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
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
Absent = Annotated[None, BeforeValidator(_absent)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
One = Annotated[Literal[1], BeforeValidator(_number)]
Empty = Annotated[list[Any], Field(max_length=0)]
TemplateText = Annotated[Text, Field(min_length=1, max_length=1 << 16)]
MAX_VALUES = 50_000
Small = BeforeValidator(_small)
JsonObject = Annotated[dict[str, Any], Small]
FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
MAX_MESSAGES = 4096
MAX_PARTS = 2048
MAX_TOOLS = 256


class CheckedIds(list[int]):
    """Token ids that were looked at beside the event loop: a prompt of many is not looked at again in it."""

    @staticmethod
    def can_be(values: list[Any]) -> bool:
        """Whether all `values`, of which there must be one, are what a TokenId may be."""
        return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_TOKEN_ID


def _unless_checked(value: Any, check: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, CheckedIds) else check(value)


#: A list of token ids, of any length.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True), WrapValidator(_unless_checked)]


class Body(BaseModel):
    """`unknown`: names of fields that this server does not know and that ask for something, here and in what it
    holds."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    def unknown(self) -> Iterator[str]:
        if extra := self.__pydantic_extra__:
            yield from (name for name, value in extra.items() if not asks_for_nothing(name, value))
        for name in _fields_with_bodies(type(self)):
            value = getattr(self, name)
            for item in value if isinstance(value, list) else (value,):
                if isinstance(item, Body):
                    yield from item.unknown()


@cache
def _fields_with_bodies(body: type[Body]) -> tuple[str, ...]:
    """Fields that may hold other bodies: nothing else need be looked at, which may be a million numbers."""

    def may_hold(hint: Any) -> bool:
        return any(map(may_hold, get_args(hint))) or (isinstance(hint, type) and issubclass(hint, Body))

    return tuple(name for name, field in body.model_fields.items() if may_hold(field.annotation))
