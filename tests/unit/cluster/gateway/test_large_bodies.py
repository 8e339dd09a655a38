"""Would catch: a large body taken in full before it is refused, and one that is read otherwise than a small one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cluster.gateway.json_bodies import read_large
from tests.unit.cluster.gateway.fake_gateway import Served

MB = 1 << 20
USER = {"role": "user", "content": "Hello"}
ODD: dict[str, Any] = {
    "messages": {"messages": [0] * MB},
    "empty messages": {"messages": [{}] * 400_000},
    "a long text": {"messages": [{"role": "user", "content": "é, " * MB}]},
    "ids": {"messages": [USER], "stop_token_ids": [1] * MB},
    "a schema": {"messages": [USER], "guided_json": {"enum": [0] * MB}},
    "keys": {"messages": [USER], "guided_json": {str(i): 0 for i in range(300_000)}},
    "tools": {"messages": [USER], "tools": [{"type": "function", "function": {"name": f"f{i}", "parameters": {
        "enum": [0] * 4000}}} for i in range(200)]},
    "documents": {"messages": [USER], "documents": [{"a": [0] * 1000}] * 1000},
    "unknown": {"messages": [USER], "what": [[0]] * (MB // 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_large_body_that_is_wrong_is_refused(roomy: Served, name: str) -> None:
    body = json.dumps({"model": "tiny"} | ODD[name], ensure_ascii=False).encode()
    assert len(body) < 8 * MB
    answer = httpx.post(f"{roomy.url}/v1/chat/completions", content=body, timeout=120,
                        headers={"Content-Type": "application/json"})  # fmt: skip
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["message"]


def test_a_large_body_that_is_right_is_served(roomy: Served) -> None:
    metadata = {"a": "x" * 300_000}
    answer = httpx.post(
        f"{roomy.url}/v1/chat/completions",
        json={"model": "tiny", "messages": [USER], "max_tokens": 2, "metadata": metadata},
    )
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
    for bad in (b'{"a": ' + b"[" * 200_000, b'{"a": "' + b"x" * 200_000, b"\xff" * 200_000, b"[0]" + b" " * 200_000):
        answer = httpx.post(
            f"{roomy.url}/v1/chat/completions", content=bad, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json", answer.text


def test_lists_are_read_in_pieces_as_they_are_in_one() -> None:
    """Would catch a value that is lost or taken for another between two pieces, what is no JSON and passes, another
    word or place for what is wrong, and a pattern that tries one text in too many ways."""
    chance = random.Random(0)

    def value(depth: int) -> Any:
        match chance.randrange(9 if depth else 4):
            case 0 | 1:
                return chance.choice([None, True, -1, 10 ** chance.randrange(40), 0.5, 1e300, [], {}, ""])
            case 2 | 3:
                return chance.choice(['a\n"\\é,]', "x" * chance.randrange(90), '"', ","]) * chance.randrange(4)
            case 4:
                return [chance.randrange(9)] * chance.randrange(5000)
            case 5:
                return {str(i): value(depth - 1) for i in range(chance.randrange(5))}
            case _:
                return [value(depth - chance.choice([1, depth])) for _ in range(chance.randrange(40))]

    for _ in range(200):
        text = json.dumps([value(3)], indent=chance.choice([None, 2]), ensure_ascii=chance.random() < 0.5)
        if chance.random() < 0.6:
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice(["", ",", "]", "}", '"', "0", "-"]) + text[at + chance.randrange(3) :]
        assert _read(read_large, text.encode()) == _read(json.loads, text.encode())
    for text in (
        "[" + "a " * MB,
        "[" + '"a" ' * MB,
        "[,1]",
        "[" + "1," * 5000 + "]",
        "[" + "NaN, -Infinity, " * 9 + "[1,",
    ):
        assert _read(read_large, text.encode()) == _read(json.loads, text.encode())


def _read(reader: Callable[[bytes], Any], body: bytes) -> str:
    """What comes of it; as text, in which NaN is NaN."""
    try:
        return repr(reader(body))
    except json.JSONDecodeError as error:
        return str(error)
