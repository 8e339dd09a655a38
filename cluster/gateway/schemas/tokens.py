"""Bodies of requests about tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.gateway.schemas.fields import Body, Text, TokenIds
from cluster.gateway.schemas.messages import Messages


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
    tokens: TokenIds
