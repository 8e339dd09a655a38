"""Names and numbers of tokens in log-probabilities."""

from __future__ import annotations

import math
from typing import Any

from cluster.gateway.tokenizer import Tokenizer

LEAST = -9999.0  # what OpenAI writes for "very unlikely"; JSON has no minus infinity


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


class TokenNames:
    """Tokens as text; those that are no whole characters as `bytes:` and their values, so that no two look alike."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def name(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def named(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self.name(token_id), "logprob": finite(logprob), "bytes": list(raw)}
