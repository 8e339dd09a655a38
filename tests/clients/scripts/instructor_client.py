from collections.abc import Iterable

import instructor
from anthropic import Anthropic
from common import ADA, MODEL, ROOT, URL, Person
from instructor import Mode
from openai import OpenAI

ASKED = [{"role": "user", "content": "Who was Ada? As JSON."}]
client = OpenAI(base_url=URL, api_key="unused", max_retries=0)
for mode in (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON, Mode.RESPONSES_TOOLS):
    asked = {"model": MODEL, "response_model": Person, "messages": ASKED, "max_retries": 0}
    assert (
        instructor.from_openai(client, mode=mode).chat.completions.create(**asked).model_dump() == ADA.model_dump()
    ), mode
for mode in (Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA):
    partial = instructor.from_openai(client, mode=mode).chat.completions.create_partial(
        model=MODEL, response_model=Person, messages=ASKED, max_retries=0
    )
    assert list(partial)[-1].model_dump() == ADA.model_dump(), mode
parallel = instructor.from_openai(client, mode=Mode.PARALLEL_TOOLS).chat.completions.create(
    model=MODEL, response_model=Iterable[Person], messages=ASKED, max_retries=0
)
assert [person.model_dump() for person in parallel] == [ADA.model_dump()]
for mode in (Mode.ANTHROPIC_TOOLS, Mode.ANTHROPIC_JSON):
    claude = instructor.from_anthropic(Anthropic(base_url=ROOT, api_key="unused", max_retries=0), mode=mode)
    found = claude.messages.create(model=MODEL, response_model=Person, messages=ASKED, max_tokens=200, max_retries=0)
    assert found.model_dump() == ADA.model_dump(), mode
