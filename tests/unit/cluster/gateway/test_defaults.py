"""What a checkpoint recommends is what a request gets that leaves it open.

Would catch a default that is not read or wins over what a client asked for, a limit that shortens what it should not,
and a file that no request could be served with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from cluster.gateway.defaults import SamplingDefaults, read_defaults
from tests.unit.cluster.gateway.fake_gateway import Served, serve

SAID: dict[str, Any] = {
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}
ASKED = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
PROMPT: dict[str, Any] = {"prompt": "Hello"}


@pytest.fixture(scope="module")
def recommended(byte_level_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway whose checkpoint recommends every field."""
    path = tmp_path_factory.mktemp("recommended") / "model"
    shutil.copytree(byte_level_path, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "max_new_tokens": 20} | SAID))
    with serve(path) as served:
        yield served


def create(served: Served, body: dict[str, Any], **more: Any) -> Any:
    """An answer by OpenAI's own client, its strict validation on."""
    client = served.client()
    endpoint: Any = client.chat.completions if "messages" in body else client.completions
    return endpoint.create(model="tiny", **body, **more)


def asked(served: Served) -> dict[str, Any]:
    """The sampling of the last request, as the router hears of it."""
    params = served.session.asked[-1][1]
    return {name: getattr(params, name) for name in SAID}


@pytest.mark.parametrize("body", [CHAT, PROMPT], ids=["chat", "completion"])
def test_what_is_left_open_is_the_checkpoints(recommended: Served, body: dict[str, Any]) -> None:
    create(recommended, body)
    assert asked(recommended) == SAID
    create(recommended, body, **dict.fromkeys(("temperature", "top_p")), extra_body=dict.fromkeys(SAID))  # null
    assert asked(recommended) == SAID


@pytest.mark.parametrize("field", SAID)
@pytest.mark.parametrize("body", [CHAT, PROMPT], ids=["chat", "completion"])
def test_what_is_asked_for_wins_field_by_field(recommended: Served, body: dict[str, Any], field: str) -> None:
    """Also where it is zero."""
    create(recommended, body, extra_body={field: ASKED[field]})
    assert asked(recommended) == SAID | {field: ASKED[field]}


def test_the_limit_is_a_chats_that_names_none(recommended: Served) -> None:
    def limit(body: dict[str, Any], **more: Any) -> int:
        return int(create(recommended, body, extra_body={"ignore_eos": True}, **more).usage.completion_tokens)

    assert limit(CHAT) == 20
    short = len(recommended.session.asked[-1][0])
    assert limit(CHAT, max_tokens=30) == limit(CHAT, max_completion_tokens=30) == 30
    assert limit(PROMPT) == 16  # OpenAI's
    fills = "Hello" + "7" * (256 - 5 - short)  # all but five tokens of the context
    assert limit({"messages": [{"role": "user", "content": fills}]}) == 5


def test_a_checkpoint_without_recommendations_leaves_openais(byte_level_path: Path, tmp_path: Path) -> None:
    assert read_defaults(byte_level_path) == read_defaults(tmp_path) == SamplingDefaults()
    assert str(SamplingDefaults()) == ""


def test_what_counts_in_the_file(tmp_path: Path) -> None:
    content = {"do_sample": False, "temperature": 0, "top_p": None, "top_k": -1, "max_new_tokens": 8.0, "max_length": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    defaults = read_defaults(tmp_path)
    assert defaults == SamplingDefaults(temperature=0.0, top_k=0, max_new_tokens=8)
    assert str(defaults) == "temperature 0.0, top_k 0, max_new_tokens 8"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"temperature": "hot"}', "'temperature' must be a number, not 'hot'"),
        ('{"temperature": true}', "'temperature' must be a number, not True"),
        ('{"temperature": -1}', "'temperature' must be between 0.0 and 2.0, not -1"),
        ('{"temperature": NaN}', "'temperature' must be between 0.0 and 2.0, not nan"),
        ('{"top_p": 1.5}', "'top_p' must be between"),
        ('{"top_k": 2.5}', "'top_k' must be a whole number, not 2.5"),
        ('{"top_k": Infinity}', "'top_k' must be a whole number, not inf"),
        ('{"top_k": -2}', "'top_k' must be between"),
        ('{"min_p": [0.1]}', "'min_p' must be a number"),
        ('{"repetition_penalty": 0}', "'repetition_penalty' must be between"),
        ('{"max_new_tokens": 0}', "'max_new_tokens' must be at least 1, not 0"),
        ("{", "Expecting"),
        ("[]", "an object is expected"),
    ],
)
def test_what_no_request_could_ask_for_is_one_error(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_defaults(tmp_path)
    assert str(caught.value).startswith(f"{file}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)
