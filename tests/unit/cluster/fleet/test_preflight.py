"""Catches a defect that only shows once Ray runs: a tokenizer, a chat template or a file of keys that is broken; and
sampling defaults that do not reach the plan, from which the gateways have them."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.errors import CheckpointError, ConfigError
from cluster.fleet.preflight import check_gateway, plan
from cluster.gateway.defaults import SamplingDefaults
from cluster.models.random import SMALL, of_family, write_random


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_random(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_checkpoint_passes(checkpoint: Path) -> None:
    check_gateway(Config(), checkpoint, 512)


def test_a_checkpoint_without_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        check_gateway(Config(), checkpoint, 512)


def test_a_broken_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="chat template"):
        check_gateway(Config(), checkpoint, 512)


def test_a_broken_file_of_keys_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("two words\n")
    with pytest.raises(ConfigError, match=r"keys:1: what follows a key"):
        check_gateway(replace(Config(), api_keys_file=keys), checkpoint, 512)


def test_sampling_defaults_are_planned_unless_turned_off(checkpoint: Path) -> None:
    config = Config(kv_cache_mb=4)
    assert plan(config, checkpoint).defaults == SamplingDefaults()
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.5}')
    assert plan(config, checkpoint).defaults == SamplingDefaults(temperature=0.5)
    (checkpoint / "generation_config.json").write_text('{"temperature": "hot"}')
    assert plan(replace(config, generation_defaults=False), checkpoint).defaults == SamplingDefaults()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: 'temperature' must be a number"):
        plan(config, checkpoint)


def test_routers_serve_a_dense_model_alone(tmp_path: Path) -> None:
    """Expert workers without experts would hold memory for nothing, or wait for a placement that never names them."""
    write_random(tmp_path / "dense", of_family(SMALL, "llama"))
    made = plan(Config(routers=2, expert_workers=3), tmp_path / "dense")
    assert (made.workers, made.routers) == ((), ("router-0", "router-1"))
    assert (made.config.transport, made.config.expert_workers) == ("local", 0)
    assert "no experts" in made.transport.reason
    assert made.memory["experts"] == 0
