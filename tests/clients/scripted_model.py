"""A model of a few rules: it calls a tool that it was told of, reads what it returned, and follows a grammar."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence

from llguidance import LLMatcher, LLTokenizer

from cluster.errors import RequestError
from cluster.gateway.tokenizer import Tokenizer
from cluster.router.params import SamplingParams, StepOutput, TokenLogprobs
from tests.unit.cluster.gateway.fake_gateway import FakeSession

PERSON = '{"name": "Ada", "age": 36}'
FORECAST = "It is sunny in Paris."
_CITY = '{"city": "Paris"}'
# The first of these that a grammar takes whole is the answer; each is what some client asks for.
GRAMMATICAL = (
    PERSON,
    _CITY,
    f'[{{"name": "get_weather", "parameters": {_CITY}}}]',
    f'[{{"name": "final_answer", "parameters": {{"answer": "{FORECAST}"}}}}]',
    f'[{{"name": "final_result", "parameters": {PERSON}}}]',
    f'[{{"name": "Person", "parameters": {PERSON}}}]',
    f'{{"person": {PERSON}}}',
    f'{{"response": {PERSON}}}',
    '{"answer": "Paris"}',
    '{"reasoning": "It is known.", "answer": "Paris"}',
    f'{{"next_thought": "Ask.", "next_tool_name": "get_weather", "next_tool_args": {_CITY}}}',
    """{"thought": "It is known.", "code": "final_answer('Paris')"}""",
    f'[{{"name": "json", "parameters": {PERSON}}}]',
)


class ScriptedSession(FakeSession):
    """Answers by `answer_to`, a token a step."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer.vocab_size, tokenizer.eos_ids)
        self._tokenizer = tokenizer
        self._grammars = LLTokenizer(str(tokenizer.path / "tokenizer.json"), eos_token=sorted(tokenizer.eos_ids)[0])

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[StepOutput, None]:
        prompt = self._tokenizer.decode(list(prompt_ids), skip_special_tokens=False)
        answer = self._grammatical(params.grammar, prompt) if params.grammar else answer_to(prompt)
        ids = self._tokenizer.encode(answer, add_special_tokens=False)
        for i, token in enumerate([*ids, min(self.eos_ids)]):
            scores = () if params.logprobs is None else (TokenLogprobs(-0.5, ((token, -0.5), (3, -1.5))),)
            prompt_scores = None
            if i == 0 and params.prompt_logprobs is not None:
                prompt_scores = (None, *(TokenLogprobs(-1.0, ((t, -1.0),)) for t in prompt_ids[1:]))
            ended = i == len(ids)
            finish = "stop" if ended else "length" if i + 1 == params.max_tokens else None
            yield StepOutput("0", (token,), scores, prompt_scores, finish)
            if finish is not None:
                return

    def _grammatical(self, grammar: str, prompt: str) -> str:
        candidates = (answer_to(prompt), *GRAMMATICAL)
        if _has_answered(prompt):  # no further call
            candidates = tuple(text for text in candidates if "get_weather" not in text)
        for text in candidates:
            matcher = LLMatcher(self._grammars, grammar, log_level=0)
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting():
                return text
        raise RequestError(f"no scripted answer follows {grammar[:2000]}", code="invalid_value")


def answer_to(prompt: str) -> str:
    """What the model says without a grammar."""
    asked = prompt.rpartition("<|im_start|>user")[2]
    if "[[ ## completed ## ]]" in prompt:  # dspy's own form
        fields = re.findall(r"\[\[ ## (\w+) ## \]\]", asked.rpartition("Respond with")[2])
        values = {"answer": "Paris", "reasoning": "It is known.", "person": PERSON}
        return "".join(f"[[ ## {field} ## ]]\n{values.get(field, '')}\n\n" for field in fields)
    if "final_answer" in prompt and "<code>" in prompt:  # smolagents' agent that writes Python
        return "Thought: I know it.\n<code>\nfinal_answer('Paris')\n</code>"
    if _has_answered(prompt):
        return FORECAST
    if '"get_weather"' in prompt:
        return f'<tool_call>{{"name": "get_weather", "arguments": {_CITY}}}</tool_call>'
    if found := re.search('"(final_result|Person)", "description', prompt):
        return f'<tool_call>{{"name": "{found[1]}", "arguments": {PERSON}}}</tool_call>'
    if "json" in asked.lower():
        values = {"answer": '"Paris"', "reasoning": '"It is known."', "person": PERSON}
        fields = [field for field in values if f"`{field}`" in asked.rpartition("Respond with")[2]]
        return "{" + ", ".join(f'"{field}": {values[field]}' for field in fields) + "}" if fields else PERSON
    return "Paris."


def _has_answered(prompt: str) -> bool:
    """Whether a tool has: as the gateway tells it, or as smolagents does."""
    return "<tool_response>" in prompt or "Observation:" in prompt
