"""Whether the tokenizer of a checkpoint and the embedding of its model go together."""

from __future__ import annotations

from contextlib import suppress

from cluster.errors import CheckpointError, RequestError
from cluster.gateway.tokenizer import Tokenizer


def check_rows(tokenizer: Tokenizer, rows: int) -> str:
    """What to tell the user of token ids for which an embedding of `rows` rows has none; "" where there are none.

    Raises CheckpointError where every chat would need such an id. An embedding with more rows than there are tokens
    is usual: it is padded.
    """
    missing = tokenizer.tokens_from(rows)
    if not missing:
        return ""
    file = tokenizer.path / "tokenizer.json"
    excess = f"the model has {rows} rows of embedding (vocab_size of {tokenizer.path / 'config.json'})"
    if needed := sorted(missing.keys() & set(_opening(tokenizer))):
        names = ", ".join(f"{missing[i]!r} ({i})" for i in needed)
        raise CheckpointError(f"{file}: the chat template needs the token {names}, but {excess}")
    first, last = min(missing), max(missing)
    ids = f"id {first}" if first == last else f"ids {first} to {last}"
    return f"{file}: {ids} cannot be used, beginning with {missing[first]!r}: {excess}"


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The token ids that the shortest chat begins with; none where it has no template or refuses that."""
    with suppress(RequestError):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
        return tokenizer.encode(prompt, add_special_tokens=False)
    return []
