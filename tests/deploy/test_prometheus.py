"""Rules and alerts by promtool; and that they, and the dashboards, speak of series that there are."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.observe.series.table import TABLE
from cluster.placement.load import imbalance
from tests.deploy.promtool import DEPLOY, promtool

FOLDER = DEPLOY / "prometheus"
RULES, ALERTS = FOLDER / "rules.yml", FOLDER / "alerts.yml"


def rules(file: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every expression of rules, alerts and dashboards, by where it stands."""
    found = {rule.get("record") or rule["alert"]: rule["expr"] for file in (RULES, ALERTS) for rule in rules(file)}
    for file in (DEPLOY / "grafana").glob("*.json"):
        board = json.loads(file.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                found[f"{file.name}: {panel['title']} {target['refId']}"] = target["expr"]
        for annotation in board.get("annotations", {}).get("list", ()):
            found[f"{file.name}: {annotation['name']}"] = annotation["expr"]
    return found


def test_rules_and_configuration_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "rules", RULES, ALERTS)
    assert "SUCCESS" in promtool("check", "config", FOLDER / "prometheus.yml")


def test_every_alert_fires_where_it_should_and_nowhere_else() -> None:
    """Cases by hand; that each alert has one of either kind is part of it."""
    promtool("test", "rules", FOLDER / "rules_test.yml")
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    fires = {a["alertname"] for test in tests for a in test.get("alert_rule_test", ()) if a.get("exp_alerts")}
    silent = {
        a["alertname"] for test in tests if "silent" in test["name"] for a in test.get("alert_rule_test", ())
    }  # a list of alerts is complete: whoever else has the series stays silent
    assert fires == silent == {rule["alert"] for rule in rules(ALERTS)}
    for rule in rules(ALERTS):
        assert rule["annotations"].keys() == {"summary", "action"} and "severity" in rule["labels"]


def test_the_recorded_imbalance_is_that_of_status_and_receipts(tmp_path: Path) -> None:
    """`cluster.placement.load.imbalance` is what the controller shows, status prints and receipts keep."""
    rng = random.Random(0)
    cases = {f"c{i}": [rng.choice((0.0, rng.uniform(0, 1e6))) for _ in range(rng.randint(1, 9))] for i in range(40)}
    cases |= {"none": [0.0, 0.0], "hand": [1000.0, 500.0, 300.0]}
    assert imbalance(cases["hand"]) == pytest.approx(1000 / 600) and imbalance(cases["none"]) == 1.0
    series = [
        {"series": f'expertmesh_worker_window_tokens{{cluster="{name}",worker="expert-{i}"}}', "values": f"{load!r}x2"}
        for name, loads in cases.items() for i, load in enumerate(loads)
    ]  # fmt: skip
    # Differences of less than 1e-9, since promtool compares to the last bit.
    asked = [
        {
            "expr": f'abs(cluster:expertmesh_imbalance:ratio{{cluster="{name}"}} - {imbalance(loads)!r}) < bool 1e-9',
            "eval_time": "1m", "exp_samples": [{"labels": f'{{cluster="{name}"}}', "value": 1}],
        }
        for name, loads in cases.items()
    ]  # fmt: skip
    file = tmp_path / "test.yml"
    content = {"rule_files": [str(RULES)], "evaluation_interval": "30s",
               "tests": [{"interval": "30s", "input_series": series, "promql_expr_test": asked}]}  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    promtool("test", "rules", file)


def test_expressions_speak_of_series_and_labels_that_there_are() -> None:
    """Would catch a series or label that was renamed in the table: a panel that is empty for ever."""
    known = {series.name: set(series.all_labels) for series in TABLE}
    for series in TABLE:
        if series.kind == "histogram":
            known |= {f"{series.name}_{part}": set(series.all_labels) for part in ("sum", "count", "bucket")}
    recorded = {rule["record"] for rule in rules(RULES)}
    assert len(expressions()) > 100
    for where, expr in expressions().items():
        names = re.findall(r"[a-z_:]*expertmesh_[a-z0-9_:]+", expr)
        assert names, where
        used = [name for name in names if name not in recorded]
        assert not [name for name in used if name not in known], where
        labels = set().union(*(known[name] for name in used)) | {"cluster", "le", "layer", "expert"}
        grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expr)
        named = {label.strip() for group in grouped for label in group.split(",")}
        named |= set(re.findall(r'[{ ,](\w+)=~?"', expr))
        assert named <= labels, (where, named - labels)


def test_dashboards_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Variables for source and cluster, ids that differ, every query of the source and the clusters that are chosen."""
    uids = set()
    for file in sorted((DEPLOY / "grafana").glob("*.json")):
        board = json.loads(file.read_text())
        uids.add(board["uid"])
        source, cluster = board["templating"]["list"]
        assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
        # Nothing chosen is all, also series without the label.
        assert cluster["name"] == "cluster" and cluster["multi"] and cluster["includeAll"]
        assert cluster["allValue"] == ".*" and cluster["current"]["value"] == ["$__all"]
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in board["panels"]:
            targets = panel.get("targets", [])
            assert panel["type"] == "row" or (targets and panel["description"])
            assert [target["refId"] for target in targets] == [chr(ord("A") + i) for i in range(len(targets))]
            for target in targets:
                assert target["datasource"]["uid"] == "${datasource}"
                for selector in re.findall(r"expertmesh_\w+(.{0,22})", target["expr"]):
                    assert selector.startswith('{cluster=~"$cluster"'), panel["title"]
    assert len(uids) == 4


def test_dashboards_are_those_of_their_source() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="needs the development tools")
    from scripts.dashboards.__main__ import rendered

    for name, text in rendered().items():
        assert (DEPLOY / "grafana" / name).read_text() == text, f"{name}: run `make dashboards`"
