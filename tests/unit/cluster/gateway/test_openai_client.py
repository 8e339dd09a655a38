"""OpenAI's own client against the gateway, its strict validation on.

Would catch: a parameter that is ignored or misread, a response or chunk that is not of OpenAI's shape, usage that does
not add up, a stream whose pieces are not the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest
from openai.types import Completion

from tests.unit.cluster.gateway.fake_gateway import Served

MESSAGES: Any = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Name"}, {"type": "text", "text": "a city."}]},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Another."},
]


def chat(served: Served, **options: Any) -> Any:
    return served.client().chat.completions.create(model="tiny", **{"messages": MESSAGES} | options)


def complete(served: Served, prompt: Any = "The capital", **options: Any) -> Any:
    return served.client().completions.create(model="tiny", prompt=prompt, **options)


def stream_completion(served: Served, prompt: Any = "The capital", **options: Any) -> list[Completion]:
    """The client's type knows no unfinished completion, though OpenAI sends `null` as well: checked without that."""
    client = served.client(strict=False)
    chunks = list(client.completions.create(model="tiny", prompt=prompt, stream=True, **options))
    for chunk in chunks:
        fields = chunk.to_dict()
        for choice in fields["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(fields)
    return chunks


def ids(served: Served, text: str) -> list[int]:
    return served.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"temperature": 0}, "temperature", 0.0),
        ({}, "temperature", 1.0),
        ({"top_p": 0.9}, "top_p", 0.9),
        ({"presence_penalty": -1.5}, "presence_penalty", -1.5),
        ({"frequency_penalty": 2}, "frequency_penalty", 2.0),
        ({"logit_bias": {"5": -100, "6": 1.5}}, "logit_bias", {5: -100.0, 6: 1.5}),
        ({"seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"max_tokens": 3}, "max_tokens", 3),
        ({"max_tokens": 3.0}, "max_tokens", 3),
        ({"extra_body": {"top_k": 40}}, "top_k", 40),
        ({"extra_body": {"top_k": -1}}, "top_k", 0),
        ({"extra_body": {"min_p": 0.1}}, "min_p", 0.1),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty", 1.1),
        ({"extra_body": {"stop_token_ids": [9, 8]}}, "stop_ids", (0, 2, 8, 9)),
        ({"extra_body": {"ignore_eos": True, "stop_token_ids": [9]}}, "stop_ids", (9,)),
        ({"extra_body": {"min_tokens": 2}, "max_tokens": 4}, "min_tokens", 2),
        ({"user": "u", "extra_body": {"metadata": {"a": "b"}}}, "ignore_eos", False),
    ],
)
@pytest.mark.parametrize("endpoint", [chat, complete])
def test_what_is_asked_reaches_the_router(endpoint: Any, served: Served, given: Any, field: str, value: object) -> None:
    endpoint(served, **given)
    assert getattr(served.session.asked[0][1], field) == value


def test_chat_prompt_is_the_template_of_the_messages(served: Served) -> None:
    chat(served, max_tokens=1)
    (prompt_ids, _), *_ = served.session.asked
    assert served.tokenizer.decode(prompt_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName\na city.<|im_end|>\n"
        "<|im_start|>assistant\nParis.<|im_end|>\n<|im_start|>user\nAnother.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_max_completion_tokens_is_the_limit_and_none_is_the_whole_context(served: Served) -> None:
    chat(served, max_completion_tokens=3, max_tokens=9)
    chat(served, extra_body={"ignore_eos": False})
    (_, first), (prompt_ids, second) = served.session.asked
    assert first.max_tokens == 3
    assert second.max_tokens == 256 - len(prompt_ids)


def test_an_answer_can_be_sent_back_as_a_message(served: Served) -> None:
    message = chat(served, max_tokens=3).choices[0].message
    after = {"role": "user", "content": "Go on."}
    chat(served, messages=[*MESSAGES, message, after], max_tokens=1)
    chat(served, messages=[*MESSAGES, {"role": "assistant", "content": message.content}, after], max_tokens=1)
    (first, _), (as_object, _), (as_text, _) = served.session.asked
    assert as_object == as_text and len(as_object) > len(first)


def test_neutral_values_of_unsupported_parameters_are_accepted(served: Served) -> None:
    chat(served, max_tokens=1, response_format={"type": "text"}, tools=[], tool_choice="none", store=False,
         parallel_tool_calls=True, service_tier="auto", modalities=["text"], safety_identifier="s",
         prompt_cache_key="k", metadata={"a": "b"})  # fmt: skip
    chat(served, max_tokens=1)
    complete(served, max_tokens=1, best_of=1, suffix="")
    complete(served, max_tokens=1)
    asked = [(prompt_ids, replace(params, seed=0)) for prompt_ids, params in served.session.asked]
    assert asked[0] == asked[1] and asked[2] == asked[3]


def test_finish_reasons_and_usage(served: Served) -> None:
    full = chat(served, max_tokens=5, extra_body={"ignore_eos": True})
    assert full.choices[0].finish_reason == "length"
    assert full.usage.completion_tokens == 5
    assert full.usage.prompt_tokens == len(served.session.asked[0][0])
    assert full.usage.total_tokens == full.usage.prompt_tokens + 5
    paris = ids(served, "Paris")
    served.session.say(*paris, 2)
    ended = chat(served)
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("Paris", "stop")
    assert ended.usage.completion_tokens == len(paris) + 1


def test_stop_strings_are_never_shown_and_end_the_sequence(served: Served) -> None:
    served.session.say(*ids(served, "one two three four "))
    for stop in ("three", ["four", " three"], ["o three"]):
        whole = chat(served, stop=stop, max_tokens=100)
        assert whole.choices[0].message.content == {"three": "one two ", "o three": "one tw"}.get(
            stop if isinstance(stop, str) else stop[0], "one two"
        )
        assert whole.choices[0].finish_reason == "stop"
        pieces = [c.choices[0].delta.content or "" for c in chat(served, stop=stop, stream=True, max_tokens=100)]
        assert "".join(pieces) == whole.choices[0].message.content
    assert served.session.open == 0


def test_n_sequences_have_seeds_of_their_own(served: Served) -> None:
    several = chat(served, n=3, seed=11, max_tokens=8, extra_body={"ignore_eos": True})
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 24
    assert sorted(params.seed for _, params in served.session.asked) == [11, 12, 13]
    alone = [chat(served, seed=11 + i, max_tokens=8, extra_body={"ignore_eos": True}) for i in range(3)]
    assert [c.message.content for c in several.choices] == [a.choices[0].message.content for a in alone]


def test_without_a_seed_answers_differ(served: Served) -> None:
    chat(served, n=2, max_tokens=1)
    chat(served, max_tokens=1)
    assert len({params.seed for _, params in served.session.asked}) == 3


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("usage", [True, False])
def test_a_chat_stream_is_the_whole_answer_in_pieces(served: Served, n: int, usage: bool) -> None:
    options: dict[str, Any] = {"n": n, "seed": 3, "max_tokens": 20}
    whole = chat(served, **options)
    stream_options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(chat(served, stream=True, **options, **stream_options))
    assert len({chunk.id for chunk in chunks}) == 1
    if usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]


def test_no_piece_of_a_stream_splits_a_character(served: Served) -> None:
    text = "naïve 東京 🙂👩‍👩‍👧!"
    served.session.say(*ids(served, text), 2)
    pieces = [c.choices[0].delta.content or "" for c in chat(served, stream=True)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_chat_logprobs(served: Served) -> None:
    served.session.say(*ids(served, "é!"), 2)
    whole = chat(served, logprobs=True, top_logprobs=2).choices[0]
    content = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == "é!"
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in content)
    chunks = [c.choices[0] for c in chat(served, logprobs=True, top_logprobs=2, stream=True)]
    assert [token for c in chunks if c.logprobs for token in c.logprobs.content] == content
    assert chat(served, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(served).choices[0].logprobs is None


def test_completions_of_every_kind_of_prompt(served: Served) -> None:
    a, b = ids(served, "The capital"), ids(served, "of France")
    texts = {
        "one text": complete(served, "The capital", seed=1).choices,
        "texts": complete(served, ["The capital", "of France"], seed=1).choices,
        "ids": complete(served, a, seed=1).choices,
        "lists of ids": complete(served, [a, b], seed=1).choices,
    }
    assert [prompt for prompt, _ in served.session.asked] == [a, a, b, a, a, b]
    assert texts["one text"][0].text == texts["texts"][0].text == texts["ids"][0].text
    assert [c.text for c in texts["texts"]] == [c.text for c in texts["lists of ids"]]
    assert all(params.max_tokens == 16 for _, params in served.session.asked)


def test_several_prompts_and_n_are_numbered_by_prompt(served: Served) -> None:
    both = complete(served, ["The capital", "of France"], n=2, seed=5, max_tokens=4, extra_body={"ignore_eos": True})
    second = complete(served, "of France", n=2, seed=5, max_tokens=4, extra_body={"ignore_eos": True})
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[2:]] == [c.text for c in second.choices]
    assert both.usage.completion_tokens == 16
    assert both.usage.prompt_tokens == len(ids(served, "The capital")) + len(ids(served, "of France"))


def test_a_completion_stream_is_the_whole_in_pieces(served: Served) -> None:
    options: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 20, "echo": True}
    whole = complete(served, **options)
    *chunks, last = stream_completion(served, stream_options={"include_usage": True}, **options)
    assert last.usage == whole.usage
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert choice.text.startswith("The capital")
        assert mine[-1].finish_reason == choice.finish_reason


def test_completion_logprobs_follow_the_text(served: Served) -> None:
    served.session.say(*ids(served, " of France"))
    choice = complete(served, logprobs=2, max_tokens=6).choices[0]
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text
    assert all(choice.text[o:].startswith(t) for o, t in zip(scores.text_offset, scores.tokens, strict=True))
    assert scores.token_logprobs == [-0.5] * 6
    assert [next(iter(top)) for top in scores.top_logprobs] == scores.tokens
    assert all(len(top) >= 2 for top in scores.top_logprobs)
    chunks = [c.choices[0] for c in stream_completion(served, logprobs=2, max_tokens=6)]
    assert [token for c in chunks for token in c.logprobs.tokens] == scores.tokens
    assert [offset for c in chunks for offset in c.logprobs.text_offset] == scores.text_offset


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("by_ids", [False, True])
def test_echo_with_logprobs_scores_the_prompt(served: Served, max_tokens: int, by_ids: bool) -> None:
    prompt = ids(served, "The capital") if by_ids else "The capital"
    served.session.say(*ids(served, " of"))
    # The first token has no log-probability, which OpenAI writes as `null` and the client's type does not know.
    client = served.client(strict=False)
    answer = client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    choice, scores = answer.choices[0], answer.choices[0].logprobs
    n = len(ids(served, "The capital"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n, max_tokens)
    assert "".join(scores.tokens) == choice.text
    assert choice.text == "The capital" if max_tokens == 0 else choice.text.startswith("The capital of")
    assert scores.token_logprobs == [None] + [-0.5] * (n - 1 + max_tokens)
    assert scores.top_logprobs[0] is None and all(scores.top_logprobs[1:])
    assert all(choice.text[o:].startswith(t) for o, t in zip(scores.text_offset, scores.tokens, strict=True))
    chunks = client.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens, stream=True
    )
    pieces = [chunk.choices[0] for chunk in chunks]
    assert [token for piece in pieces for token in piece.logprobs.tokens] == scores.tokens
    assert [offset for piece in pieces for offset in piece.logprobs.text_offset] == scores.text_offset


def test_echo_alone_needs_no_router(served: Served) -> None:
    choice = complete(served, echo=True, max_tokens=0).choices[0]
    assert (choice.text, choice.finish_reason) == ("The capital", "length")
    assert served.session.asked == []


def test_errors_are_those_of_the_client(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.client().models.retrieve("other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(served, temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )


def test_models(served: Served) -> None:
    (card,) = served.client().models.list().data
    assert served.client().models.retrieve(card.id) == card
    assert (card.id, card.created, card.owned_by) == ("tiny", 1_700_000_000, "expertmesh")


def test_a_failure_in_the_middle_reaches_the_client_as_an_error(served: Served) -> None:
    served.session.failure = RuntimeError("secret detail")
    with pytest.raises(openai.APIError, match="failed to answer") as caught:
        list(chat(served, stream=True, extra_body={"ignore_eos": True}))
    assert caught.value.code == "internal_error"
    with pytest.raises(openai.InternalServerError) as caught:
        chat(served, extra_body={"ignore_eos": True})
    assert "secret" not in str(caught.value)
