"""Prompts to token ids."""

from __future__ import annotations

from functools import partial

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.generation import Echo
from cluster.gateway.offload import aside, give_way
from cluster.gateway.schemas.completions import Prompt


def check_length(gateway: Gateway, text: str, param: str) -> None:
    """Raise RequestError where the field `param` cannot fit, however it is tokenised: before it is."""
    most = gateway.model.max_context
    if len(text) > most * max(gateway.tokenizer.longest_piece, 1):
        message = f"This model's maximum context length is {most} tokens; '{param}' has {len(text)} characters"
        raise RequestError(message, code="context_length_exceeded", param=param)


async def encode(gateway: Gateway, text: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of `text`; beside the event loop where it is long."""
    return await aside(partial(gateway.tokenizer.encode, add_special_tokens=add_special_tokens), text, len(text))


async def decode(gateway: Gateway, ids: list[int]) -> str:
    """The text of `ids`, special tokens by their names; beside the event loop where they are many."""
    return await aside(lambda ids: gateway.tokenizer.decode(ids, skip_special_tokens=False), ids, len(ids))


async def echo_of(gateway: Gateway, text: str | None, prompt_ids: list[int]) -> Echo:
    """The prompt as a part of the answer: as it was sent, or, if as token ids, as those are spelt."""
    if text is None:
        return Echo(*await aside(gateway.tokenizer.spell, prompt_ids, len(prompt_ids)))
    offsets = await aside(gateway.tokenizer.offsets, text, len(text))
    return Echo(text, offsets or [0] * len(prompt_ids))  # an empty text has its first token only


async def prompts(gateway: Gateway, prompt: Prompt) -> list[tuple[str | None, list[int]]]:
    """Each prompt of a request: its text, where it came as text, and its token ids."""
    if isinstance(prompt, str):
        return [(prompt, await _encode_prompt(gateway, prompt))]
    if isinstance(prompt[0], int):
        return [(None, prompt)]
    found: list[tuple[str | None, list[int]]] = []
    for item in prompt:
        found.append((item, await _encode_prompt(gateway, item)) if isinstance(item, str) else (None, item))
        await give_way()
    return found


async def _encode_prompt(gateway: Gateway, text: str) -> list[int]:
    """An empty prompt is the model's first token, if it has one."""
    check_length(gateway, text, "prompt")
    ids = await encode(gateway, text, add_special_tokens=True)
    bos_id = gateway.tokenizer.bos_id
    return ids or ([bos_id] if bos_id is not None else [])
