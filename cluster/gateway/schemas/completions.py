"""The body of a request to go on with a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.gateway.schemas.fields import Count, NTop, One, Text, TokenIds
from cluster.gateway.schemas.sampling import SamplingFields
from cluster.router import limits

_Ids = Annotated[TokenIds, Field(min_length=1)]
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
