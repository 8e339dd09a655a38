"""Would catch: a large body taken in full before it is refused, and one that is read otherwise than a small one."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cluster.gateway import bodies
from cluster.gateway.json_bodies import read_large
from cluster.gateway.tokenizer import Tokenizer
from cluster.router import grammar
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


def test_work_that_takes_long_is_done_beside_the_event_loop(roomy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch one of these in the loop, where it holds every stream up: 0.5 s for a gzip body of 7 MB."""
    in_loop: dict[str, list[bool]] = {}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **named: Any) -> Any:
            in_loop.setdefault(name, []).append(asyncio._get_running_loop() is not None)
            return original(*args, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(bodies, "_unpacked")
    watch(grammar, "from_json_schema")
    watch(Tokenizer, "encode_all")
    schema = {"enum": ["a"]}
    asked = {"model": "tiny", "prompt": ["Hello", "you"], "max_tokens": 1, "guided_json": schema}
    answer = httpx.post(
        f"{roomy.url}/v1/completions",
        content=gzip.compress(json.dumps(asked | {"bad_words": ["ab" * 250] * 16}).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert answer.status_code == 200, answer.text
    assert in_loop == {name: [False] for name in ("_unpacked", "from_json_schema", "encode_all")}


def test_what_no_reader_takes_is_refused_in_one_sentence(roomy: Served) -> None:
    """Small and large: Python's reader raises another exception for each."""
    headers = {"Content-Type": "application/json"}
    wrong = {
        "nested too deeply": (b'{"a":' * 20_000, b"[" * 200_000),
        "a number has too many digits": (b'{"seed": ' + b"9" * 5000 + b"}", b'{"seed": ' + b"9" * 200_000 + b"}"),
        "half of a surrogate pair": (b'{"model": "tiny", "prompt": "\\ud800"}',),
        "not in UTF-8": (b'{"a": "\xff"}', b'{"a": "\xff' + b"a" * 200_000 + b'"}'),
    }
    for said, alike in wrong.items():
        for body in alike:
            answer = httpx.post(f"{roomy.url}/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400 and said in answer.json()["error"]["message"], (said, answer.text)


def test_more_scores_than_there_is_memory_for_are_refused(roomy: Served) -> None:
    asked = {"model": "tiny", "prompt": [[5] * 900] * 128, "max_tokens": 1}
    answer = httpx.post(f"{roomy.url}/v1/completions", json=asked | {"prompt_logprobs": 20}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"
    assert "2419200 numbers; at most 500000" in answer.json()["error"]["message"]


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
