"""Beginnings of prompts: found where tokens and salt are the same, and never more of them than are bounded."""

from __future__ import annotations

import pytest

from cluster.gateway import prefixes
from cluster.gateway.prefixes import SeenPrefixes, prefixes_of


def test_as_much_is_shared_as_begins_alike() -> None:
    seen = SeenPrefixes()
    seen.add(prefixes_of(list(range(300)), ""))
    asked = {
        (300, 0, ""): 4,
        (300, 63, ""): 0,  # differs in the first 64 tokens
        (300, 64, ""): 1,
        (300, 200, ""): 3,
        (130, 130, ""): 2,  # shorter
        (63, 63, ""): 0,  # too short to have a name
        (900, 300, ""): 4,  # goes on
        (300, 0, "of another tenant"): 0,
    }
    for (n_tokens, differs_at, salt), shared in asked.items():
        prompt = list(range(n_tokens))
        if differs_at:
            prompt[differs_at:] = [7] * (n_tokens - differs_at)
        assert seen.shared(prefixes_of(prompt, salt)) == shared, (n_tokens, differs_at, salt)


def test_what_was_not_used_for_longest_is_forgotten_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_MOST", 6)
    old, used, new = (prefixes_of([token] * 192, "") for token in (1, 2, 3))
    seen = SeenPrefixes()
    seen.add(old)
    seen.add(used)
    seen.add(old[:1])
    seen.add(new[:1])
    assert [seen.shared(names) for names in (old, used, new)] == [2, 3, 1]
    seen.add(used)
    seen.add(new)
    assert [seen.shared(names) for names in (old, used, new)] == [0, 3, 3]
