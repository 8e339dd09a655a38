"""Names of fields about which more is known than their type.

`NEUTRAL` fields are there because clients send them with the only value that is served; another value is refused as
unsupported. `UNSUPPORTED` are the names that other servers know and this one does not: refused by name, unless they ask
for nothing (`asks_for_nothing`). Any other unknown field is ignored, or refused with `strict_fields`.
"""

from __future__ import annotations

from typing import Any

_NEUTRAL = """
    audio best_of include_obfuscation modalities suffix
"""
_OPENAI = """
    audio best_of conversation moderation suffix web_search_options
"""
_OTHERS = """
    early_stopping ebnf guided_decoding_backend json_schema kv_transfer_params length_penalty
    logits_processors logprob_token_ids lora_path mm_processor_kwargs prompt_embeds regex stop_regex
    thinking_token_budget use_beam_search vllm_xargs
"""
NEUTRAL = frozenset(_NEUTRAL.split())
UNSUPPORTED = frozenset(_OPENAI.split() + _OTHERS.split())

INSTEAD = {"use_beam_search": "'n' asks for several sampled answers"}
# Values with which they mean what is done here anyway.
_OFF: dict[str, Any] = {
    "best_of": 1,
    "early_stopping": False,
    "length_penalty": 1,
    "mm_processor_kwargs": {},
    "suffix": "",
    "use_beam_search": False,
    "vllm_xargs": {},
}


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether the unknown field `name` may as well be absent: null, or what is done anyway."""
    return value is None or (name in _OFF and value == _OFF[name])
