"""Would catch: a series that Prometheus or its linter refuses, `_created` series, buckets that do not add up, a scrape
of several processes in which a family stands twice, two processes of a machine at one port."""

from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.cardinality import Cluster, per_expert
from cluster.observe.distribution import Distribution
from cluster.observe.endpoint import Endpoint
from cluster.observe.exposition import Aliases, Reading, Readings, merged, text_of
from cluster.observe.series import gateway, process, router
from cluster.observe.series.table import TABLE
from tests.promtool import check_metrics


def every_series(value: float) -> list[Reading]:
    """One sample of each series of the table."""
    readings = []
    for series in TABLE:
        distribution = Distribution(series.buckets)
        distribution.add(value)
        shown = distribution if series.kind == "histogram" else value
        readings.append(Reading(series, shown, tuple(f"a {label}" for label in series.labels)))
    return readings


def test_the_table_is_clean_for_promtool() -> None:
    text = text_of(Readings("x-0", [lambda: every_series(1.0)]))
    assert check_metrics(text) == ""
    assert b"_created" not in text


def test_names_are_unique_and_follow_the_rules() -> None:
    names = [series.name for series in TABLE]
    assert len(set(names)) == len(names)
    for series in TABLE:
        assert re.fullmatch(r"expertmesh_[a-z_]+", series.name)
        assert series.name.endswith("_total") == (series.kind == "counter"), series.name
        assert bool(series.buckets) == (series.kind == "histogram"), series.name
        assert list(series.buckets) == sorted(set(series.buckets))
        assert not series.unit or series.unit in series.name, f"{series.name} does not say its unit"
        assert len(set(series.all_labels)) == len(series.all_labels), f"{series.name} has a label twice"


def test_a_histogram_counts_each_value_in_its_bucket_and_all_above() -> None:
    counted = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        counted.add(value)
    counted.add(2.0, 3)
    text = text_of(Readings("router-0", [lambda: [Reading(router.STEP, counted)]])).decode()
    (family,) = text_string_to_metric_families(text)
    found = {(s.name.rpartition("_")[2], s.labels.get("le", "")): s.value for s in family.samples}
    assert found == {
        ("bucket", "1.0"): 2, ("bucket", "2.0"): 6, ("bucket", "+Inf"): 7, ("count", ""): 7, ("sum", ""): 18,
    }  # fmt: skip


def test_scrapes_of_two_processes_are_one_with_each_family_once() -> None:
    texts = [text_of(Readings(name, [lambda: every_series(2.0)])).decode() for name in ("a-0", "a-1")]
    whole = merged(texts)
    heads = [line for line in whole.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)) == len(TABLE)
    alone = {line for text in texts for line in text.splitlines() if not line.startswith("#")}
    assert {line for line in whole.splitlines() if not line.startswith("#")} == alone
    assert check_metrics(merged(texts[:1])) == ""


def test_vllms_names_stand_beside_ours_only_when_they_are_asked_for() -> None:
    readings = [Reading(router.RUNNING, 3), Reading(gateway.FINISHED, 2, ("stop",)), Reading(process.EPOCH, 1)]
    plain = text_of(Readings("router-1", [lambda: readings])).decode()
    assert "vllm:" not in plain
    text = text_of(Readings("router-1", [lambda: readings], Aliases.of("mixtral", "router-1"))).decode()
    assert 'vllm:num_requests_running{engine="1",model_name="mixtral"} 3.0' in text
    assert 'vllm:request_success_total{engine="1",finished_reason="stop",model_name="mixtral"} 2.0' in text
    assert [line for line in text.splitlines() if "vllm" not in line] == plain.splitlines()


def test_processes_of_a_machine_take_ports_in_a_row() -> None:
    readings = Readings("router-0", [lambda: [Reading(router.RUNNING, 3)]])
    first = Endpoint(readings, "127.0.0.1")
    second = Endpoint(readings, "127.0.0.1", first.port)
    try:
        assert second.port > first.port
        answer = httpx.get(second.url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert 'expertmesh_requests_running{router="router-0"} 3.0' in answer.text
        assert "_created" not in answer.text
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(("layers", "experts", "expected"), [(32, 8, True), (58, 256, False)])
def test_large_models_have_no_series_per_expert_unless_told(layers: int, experts: int, expected: bool) -> None:
    assert per_expert("auto", layers, experts) is expected
    assert per_expert("on", layers, experts) and not per_expert("off", layers, experts)
    cluster = Cluster(layers, experts, n_workers=8)
    assert cluster.samples(True) > cluster.samples(False) + 3 * layers * experts
    assert cluster.samples(False) < 2000
