"""The fields of vLLM that speak of tokens.

Catches: ids that are not those of the text, a usage that does not grow, a prompt cut at the wrong end.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.unit.cluster.gateway.fake_gateway import Served
from tests.unit.cluster.gateway.scripted import prompt, say

PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "The capital of France"},
}


def post(served: Served, path: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(served.url + path, json={"model": "tiny", "max_tokens": 5} | PATHS[path] | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chunks(served: Served, path: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "max_tokens": 5, "stream": True} | PATHS[path] | fields
    lines = httpx.post(served.url + path, json=body).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]


def prompt_fields(answer: dict[str, Any]) -> dict[str, Any]:
    """What is said of the prompt: of a chat there is one, text completions have one for each choice."""
    place = answer if "chat" in answer["object"] else answer["choices"][0]
    return {name: value for name, value in place.items() if name.startswith("prompt_")}


@pytest.mark.parametrize("path", PATHS)
def test_ids_of_prompt_and_answer(served: Served, path: str) -> None:
    say(served, "Paris.")
    answer = post(served, path, return_token_ids=True)
    choice = answer["choices"][0] | prompt_fields(answer)
    asked = served.session.asked[-1][0]
    ids = [*served.tokenizer.encode("Paris.", False), 2]
    assert choice["prompt_token_ids"] == asked and choice["token_ids"] == ids[:5]
    streamed = [c["choices"][0] | prompt_fields(c) for c in chunks(served, path, return_token_ids=True)]
    assert [i for c in streamed for i in c.get("token_ids", [])] == ids[:5]
    assert [c["prompt_token_ids"] for c in streamed if "prompt_token_ids" in c] == [asked]


@pytest.mark.parametrize("path", PATHS)
def test_usage_with_every_chunk(served: Served, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    used = [c["usage"]["completion_tokens"] for c in chunks(served, path, stream_options=options, ignore_eos=True)]
    assert used == sorted(used) and used[-1] == 5 and len(set(used)) >= 4
    assert used[0] == (0 if "chat" in path else 1)  # a chat's first chunk has no text yet


@pytest.mark.parametrize("path", PATHS)
def test_scores_of_the_prompt(served: Served, path: str) -> None:
    scores, asked = prompt_fields(post(served, path, prompt_logprobs=2))["prompt_logprobs"], served.session.asked[-1][0]
    assert scores[0] is None and len(scores) == len(asked)
    assert all(str(token_id) in entry for token_id, entry in zip(asked[1:], scores[1:], strict=True))
    answer = httpx.post(served.url + path, json={"model": "tiny", "stream": True, "prompt_logprobs": 0} | PATHS[path])
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"


def test_names_are_ids_where_that_is_wanted(served: Served) -> None:
    choice = post(served, "/v1/completions", logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
    assert all(name.startswith("token_id:") for name in choice["logprobs"]["tokens"])


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_is_cut_at_its_beginning(served: Served, path: str) -> None:
    post(served, path)
    whole = served.session.asked[-1][0]
    answer = post(served, path, truncate_prompt_tokens=3)
    assert served.session.asked[-1][0] == whole[-3:] and answer["usage"]["prompt_tokens"] == 3
    post(served, path, truncate_prompt_tokens=3, truncation_side="right")
    assert served.session.asked[-1][0] == whole[:3]


@pytest.mark.parametrize("path", PATHS)
def test_what_ended_the_answer(served: Served, path: str) -> None:
    say(served, "one STOP two")
    assert post(served, path, stop=["STOP"], max_tokens=50)["choices"][0]["stop_reason"] == "STOP"
    assert chunks(served, path, stop=["STOP"], max_tokens=50)[-1]["choices"][0]["stop_reason"] == "STOP"
    last = served.tokenizer.encode("Paris.", False)[-1]
    say(served, "Paris.")
    assert post(served, path, stop_token_ids=[last], max_tokens=50)["choices"][0]["stop_reason"] == last
    assert post(served, path, max_tokens=50)["choices"][0]["stop_reason"] is None


def test_the_last_message_before_the_answer(served: Served) -> None:
    say(served, " Paris.")
    turns = [{"role": "user", "content": "City?"}, {"role": "assistant", "content": "The city is"}]
    fields: Any = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = post(served, "/v1/chat/completions", **fields)
    assert answer["choices"][0]["message"]["content"].startswith("The city is Paris")
    streamed = chunks(served, "/v1/chat/completions", **fields)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed).startswith("The city is Paris")
    assert prompt(served).endswith("The city is")


def test_what_only_the_router_acts_on_gets_there(served: Served) -> None:
    post(served, "/v1/completions", priority=-3, cache_salt="mine", bad_words=["Paris"])
    params = served.session.asked[-1][1]
    assert (params.priority, params.cache_salt) == (-3, "mine")
    assert set(params.bad_words) == {tuple(served.tokenizer.encode(text, False)) for text in ("Paris", " Paris")}


@pytest.mark.parametrize("path", PATHS)
def test_the_experts_of_each_token_one_chunk_later(served: Served, path: str) -> None:
    """Layer 1 of three has no experts; the fake model sends token i to the experts i and i + 1."""
    say(served, "Paris.")
    assert "routing" not in post(served, path)["choices"][0]
    choice = post(served, path, return_routing=True, max_tokens=4)["choices"][0]
    wanted = [[[i, i + 1], [], [i, i + 1]] for i in range(3)]
    assert served.session.asked[-1][1].routing and choice["routing"] == {"start": 0, "experts": wanted}
    streamed = [c["choices"][0] for c in chunks(served, path, return_routing=True, max_tokens=4)]
    parts = [c["routing"] for c in streamed if "routing" in c]
    assert [part["start"] for part in parts] == [0, 1, 2] and [e for part in parts for e in part["experts"]] == wanted
