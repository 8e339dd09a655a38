"""Would catch: an error outside the envelope or without the field at fault, a limit that does not hold, a leak."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import RequestError
from tests.unit.cluster.gateway.fake_gateway import Served, serve

F: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
USER: dict[str, Any] = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hello"}


def refused(response: httpx.Response) -> tuple[int, str | None, str]:
    """Status, field and code of an error; its envelope is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["code"], str)
    assert response.headers["content-type"] == "application/json"
    return response.status_code, error["param"], error["code"]


def post(served: Served, path: str, body: Any) -> httpx.Response:
    return httpx.post(served.url + path, json=body)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"seed": 2**63 + 1}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": ["ok", "x" * 513]}, "stop", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"stop_token_ids": [340]}, "stop_token_ids", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "invalid_value"),
        ({"logit_bias": {"340": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**9}, "{prompt}", "context_length_exceeded"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"logits_processors": []}, "logits_processors", "unsupported_parameter"),
        ({"guided_json": {"type": "objekt"}}, "guided_json", "invalid_value"),
        ({"guided_json": "{"}, "guided_json", "invalid_value"),
        ({"guided_regex": "(("}, "guided_regex", "invalid_value"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "invalid_value"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "invalid_value"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex", "invalid_value"),
        ({"response_format": {"type": "json"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        (
            {"guided_json": {"properties": {"a": {"items": {"type": "x"}}}}},
            "guided_json.properties.a.items",
            "invalid_value",
        ),
        ({"allowed_token_ids": [340]}, "allowed_token_ids", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
        ({"model": None}, "model", "invalid_value"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_bad_field_is_named(served: Served, path: str, change: dict[str, Any], param: str, code: str) -> None:
    base, prompt = (CHAT, "messages") if "chat" in path else (TEXT, "prompt")
    status = 404 if code == "model_not_found" else 400
    assert refused(post(served, path, base | change)) == (status, param.format(prompt=prompt), code)
    assert served.session.asked == []


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [USER | {"role": "A tester"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{}] * 4097}, "messages", "invalid_value"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        ({"messages": [USER | {"content": 5}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        (
            {"messages": [USER | {"tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [F, F]}, "tools", "invalid_value"),
        (
            {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [F], "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "invalid_value"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"messages": [USER | {"content": "word " * 300}]}, "messages", "context_length_exceeded"),
    ],
)
def test_a_bad_field_of_chat_is_named(served: Served, change: dict[str, Any], param: str, code: str) -> None:
    assert refused(post(served, "/v1/chat/completions", CHAT | change)) == (400, param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": [340]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": [1] * 241, "max_tokens": 16}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 256}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ],
)
def test_a_bad_field_of_completions_is_named(served: Served, change: dict[str, Any], param: str, code: str) -> None:
    assert refused(post(served, "/v1/completions", TEXT | change)) == (400, param, code)


def test_unknown_fields_are_ignored_unless_they_are_to_be_refused(served: Served, byte_level_path: Path) -> None:
    odd = CHAT | {"nonsense": 1, "messages": [USER | {"more": [1]}], "stream_options": None}
    assert post(served, "/v1/chat/completions", odd | {"logits_processors": None}).status_code == 200
    with serve(byte_level_path, strict_fields=True) as strict:
        assert refused(post(strict, "/v1/chat/completions", odd)) == (400, "nonsense", "unknown_parameter")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "tiny"', b"[]", b"5", b'"\xff"', b"[" * 50_000, b'{"a": %s}' % (b"9" * 5000), b"null"],
)
def test_a_body_that_is_no_json_object_is_refused(served: Served, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers)
    assert refused(response)[0] == 400


def test_half_a_surrogate_pair_is_refused(served: Served) -> None:
    headers = {"content-type": "application/json"}
    for body in (b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "\\ud800", "prompt": "", "\\udfff": 1}',
                 b'{"model": "tiny", "prompt": "", "temperature": NaN}'):  # fmt: skip
        response = httpx.post(f"{served.url}/v1/completions", content=body, headers=headers)
        assert refused(response)[0] == 400


def test_a_body_over_the_limit_is_refused_however_it_is_sent(served: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    url = f"{served.url}/v1/completions"
    assert refused(httpx.post(url, content=b"x" * 100_001)) == (413, None, "request_too_large")
    assert refused(httpx.post(url, content=chunks())) == (413, None, "request_too_large")
    assert refused(httpx.post(url, content=b"x" * 100_000))[0] == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_full_queue_is_429_with_retry_after(served: Served, stream: bool, n: int) -> None:
    served.session.refusal = RequestError("The queue is full", code="queue_full", status=429, retry_after_s=3)
    response = post(served, "/v1/chat/completions", CHAT | {"stream": stream, "n": n})
    assert refused(response) == (429, None, "queue_full")
    assert response.headers["retry-after"] == "3"
    assert served.session.open == 0


def test_what_is_refused_is_told_what_to_do(served: Served) -> None:
    """Would catch a sentence that names our types, the wrong field, or a field that is ignored though it changes the
    answer; and one that is refused with the value that means what is done anyway."""
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    said = {
        ("/v1/chat/completions", "messages"): ([USER | {"content": image}], "is of type 'image_url'; this model reads"),
        ("/v1/chat/completions", "use_beam_search"): (True, "'n' asks for several sampled answers"),
        ("/v1/chat/completions", "guided_json"): ("{", "'guided_json': is not JSON"),
        ("/v1/responses", "input"): ([], "'input': must be a text, or a list of at least one item"),
        ("/v1/responses", "input "): ([{"type": "reasoning", "summary": []}], "'input' has no message"),
        ("/v1/responses", "input  "): ([{"type": "item_reference", "id": "a"}], "'type' must be 'message', 'function"),
        ("/v1/responses", "conversation"): ("conv_1", "'conversation': is not supported"),
        ("/v1/responses", "prompt"): ({"id": "p"}, "'prompt': is not supported"),
        ("/v1/messages", "messages"): ([USER | {"content": [{"type": "document"}]}], "is of type 'document'; this"),
        ("/v1/embeddings", "input"): ("Hello", "This server generates text, by POST to /v1/chat/completions"),
        ("/v1/models", "input"): ("Hello", "This path takes GET alone"),
    }
    for (path, field), (value, words) in said.items():
        answer = post(served, path, {"max_tokens": 1, "input": "Hello"} | CHAT | {field.strip(): value})
        assert answer.status_code in (400, 404, 405) and words in answer.json()["error"]["message"], answer.text
    same = {"use_beam_search": False, "best_of": 1, "length_penalty": 1.0, "early_stopping": False, "suffix": ""}
    assert post(served, "/v1/chat/completions", CHAT | same).status_code == 200


def test_unknown_routes_and_methods_have_the_envelope_too(served: Served) -> None:
    assert refused(httpx.get(f"{served.url}/v1/nothing")) == (404, None, "unknown_url")
    response = httpx.get(f"{served.url}/v1/completions")
    assert refused(response) == (405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert refused(httpx.get(f"{served.url}/v1/models/a/b")) == (404, "model", "model_not_found")


def test_an_unforeseen_error_says_nothing_of_its_cause(served: Served) -> None:
    served.session.failure = ZeroDivisionError("secret")
    response = post(served, "/v1/completions", TEXT | {"max_tokens": 8, "ignore_eos": True})
    assert refused(response) == (500, None, "internal_error")
    assert "secret" not in response.text and "Traceback" not in response.text


def test_an_error_in_a_stream_is_its_last_event(served: Served) -> None:
    served.session.failure = RequestError("lost", code="service_unavailable", status=503)
    served.session.say(*served.tokenizer.encode("The capital", add_special_tokens=False))
    response = post(served, "/v1/completions", TEXT | {"stream": True, "ignore_eos": True})
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert end == ""
    assert '"code":"service_unavailable"' in last


def test_every_response_has_a_request_id(served: Served) -> None:
    mine = httpx.get(f"{served.url}/health", headers={"x-request-id": "mine-1"})
    assert mine.headers["x-request-id"] == "mine-1"
    odd = httpx.get(f"{served.url}/v1/nothing", headers={"x-request-id": "no spaces"})
    assert odd.headers["x-request-id"].startswith("req_")
