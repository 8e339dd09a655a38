"""Names of fields about which more is known than their type.

`NEUTRAL` fields are there because clients send them with the only value that is served; another value is refused as
unsupported. `UNSUPPORTED` are the names that other servers know and this one does not: refused by name, unless null.
Any other unknown field is ignored, or refused with `strict_fields`.
"""

from __future__ import annotations

_NEUTRAL = """
    audio best_of include_obfuscation modalities suffix
"""
_OPENAI = """
    audio best_of moderation suffix web_search_options
"""
_OTHERS = """
    early_stopping ebnf guided_decoding_backend json_schema kv_transfer_params length_penalty
    logits_processors logprob_token_ids lora_path mm_processor_kwargs prompt_embeds regex stop_regex
    thinking_token_budget use_beam_search vllm_xargs
"""
NEUTRAL = frozenset(_NEUTRAL.split())
UNSUPPORTED = frozenset(_OPENAI.split() + _OTHERS.split())
