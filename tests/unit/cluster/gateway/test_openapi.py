"""Would catch: a body that no one thought of and that ends in a 5xx, or an /openapi.json that says what is not so.

`EXPERTMESH_EXAMPLES=1000 pytest THIS` for so many of each operation, other ones every time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.config import Config
from cluster.gateway.app import create_app
from cluster.gateway.context import ModelCard
from cluster.gateway.defaults import SamplingDefaults
from cluster.gateway.tokenizer import Tokenizer
from tests.unit.cluster.gateway.fake_gateway import FakeSession

OPERATIONS = {
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{response_id}"),
    ("delete", "/v1/responses/{response_id}"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/invocations"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("get", "/health"),
    ("get", "/ping"),
    ("get", "/load"),
    ("get", "/ready"),
    ("get", "/version"),
    ("get", "/metrics"),
    ("get", "/metrics/targets"),
}
EXAMPLES = int(os.environ.get("EXPERTMESH_EXAMPLES", "60"))
CASES = [
    (mode, method, path)
    for mode in GenerationMode
    for method, path in sorted(OPERATIONS)
    if mode is GenerationMode.POSITIVE or method == "post"
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def api(byte_level_path: Path) -> Any:
    tokenizer = Tokenizer(byte_level_path)
    model = ModelCard(
        "tiny", str(byte_level_path), 64, vocab_size=tokenizer.vocab_size, created=0, defaults=SamplingDefaults()
    )
    session = FakeSession(tokenizer.vocab_size, tokenizer.eos_ids)
    return schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(Config(allowed_hosts="testserver"), model, tokenizer, session)
    )


def test_every_route_is_described(api: Any) -> None:
    paths = api.raw_schema["paths"]
    assert {(method, path) for path, methods in paths.items() for method in methods} == OPERATIONS
    assert "422" not in str(paths)


@pytest.mark.parametrize(("mode", "method", "path"), CASES)
def test_every_operation_answers_as_it_says(api: Any, mode: GenerationMode, method: str, path: str) -> None:
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 60, deadline=None, suppress_health_check=list(HealthCheck))
    def answers(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # any other would end nearly every request at 404
        case.call_and_validate(checks=CHECKS)

    answers()
