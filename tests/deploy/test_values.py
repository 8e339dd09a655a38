"""Would catch values that are misspelt or do not fit together and are taken all the same, a rule whose words help
nobody, and a value that nobody explains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import CHART, HELMS, helm

OPEN = {"global", "startup", "readiness", "liveness", "name", "kind", "group", "claims"}  # of what is empty by default
REFUSED = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: json.dumps(refused["values"])[:60])
def test_values_are_refused_with_words_that_help(refused: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(json.dumps(refused["values"]))
    result = helm("template", "r", CHART, "-f", file)
    assert result.returncode != 0, "taken"
    assert refused["says"] in result.stderr


def test_the_older_helm_refuses_all_of_them_too(tmp_path: Path) -> None:
    for number, refused in enumerate(REFUSED):
        file = tmp_path / f"{number}.yaml"
        file.write_text(json.dumps(refused["values"]))
        assert helm("template", "r", CHART, "-f", file, version=HELMS[1]).returncode != 0, refused["values"]


def test_every_rule_has_values_that_break_it() -> None:
    """Of templates/validate.yaml; a rule that nothing breaks may be one that cannot be broken."""
    text = (CHART / "templates/validate.yaml").read_text()
    rules = re.findall(r'append \$problems \(?(?:printf )?"((?:[^"\\]|\\.)*)"', text)
    assert len(rules) > 15
    said = [str(refused["says"]) for refused in REFUSED]
    for rule in rules:
        shown = re.compile(re.sub(r"%[a-z]", ".*", re.escape(rule).replace(r"\%", "%")))
        parts = [part.strip() for part in re.split(r"%[a-z]", rule) if len(part.strip()) > 10]
        assert any(shown.fullmatch(text) or any(text in part or part in text for part in parts) for text in said), rule


def test_the_schema_knows_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(value: Any, rule: Any, path: str) -> None:
        if "$ref" in rule:
            rule = schema["$defs"][rule["$ref"].rpartition("/")[2]]
        if "properties" in rule and path != "config":
            assert rule["additionalProperties"] is False, path
            assert set(rule["properties"]) - OPEN <= set(value), path
            for key, part in value.items():
                compare(part, rule["properties"][key], f"{path}.{key}".strip("."))

    compare(values, schema, "")
