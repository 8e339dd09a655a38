"""What the dashboards are made of: queries that follow the variables, panels of a few kinds, the frame around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    DataSourceRef,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# All clusters, also series that no `cluster` was added to, while nothing is chosen.
FILTER = 'cluster=~"$cluster"'
_COLOURS = ("yellow", "green", "blue", "red")  # of starting, ready, draining, lost
_SELECTOR = re.compile(r"\b(expertmesh_\w+)(\{([^}]*)\})?")


def filtered(expr: str) -> str:
    """The expression with every selector limited to the clusters that are chosen."""
    return _SELECTOR.sub(lambda m: f"{m[1]}{{{', '.join(part for part in (FILTER, m[3]) if part)}}}", expr)


def query(expr: str, legend: str = "", form: str = "time_series", now: bool = False) -> prometheus.Dataquery:
    """A query; `now`: of the end of the time range alone."""
    made = prometheus.Dataquery().expr(filtered(expr)).datasource(SOURCE).legend_format(legend or "__auto")
    made = made.format(PromQueryFormat(form))
    return made.instant() if now else made.range()


def quantiles(series: str) -> list[prometheus.Dataquery]:
    """The 50th, 90th and 99th percentile and the mean of a histogram."""
    made = [
        query(f"histogram_quantile({q}, sum by (le) (rate({series}_bucket[$__rate_interval])))", name)
        for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    ]
    rate = "sum(rate({}[$__rate_interval]))"
    return [*made, query(f"{rate.format(series + '_sum')} / {rate.format(series + '_count')}", "mean")]


def _placed(panel: Any, title: str, says: str, unit: str, width: int, height: int) -> Any:
    panel = panel.title(title).description(says).datasource(SOURCE).span(width).height(height)
    return panel.unit(unit) if unit else panel


def lines(
    title: str, says: str, targets: Sequence[prometheus.Dataquery], unit: str = "short", *, width: int = 8,
    stacked: bool = False, floor: float | None = 0,
) -> timeseries.Panel:  # fmt: skip
    """Values over time."""
    panel = _placed(timeseries.Panel(), title, says, unit, width, 8).targets(_numbered(targets))
    panel = panel.draw_style(GraphDrawStyle.LINE).fill_opacity(25 if stacked else 0).line_width(1)
    panel = panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    panel = panel.legend(
        common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM).calcs([])
    )  # fmt: skip
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return panel if floor is None else panel.axis_soft_min(floor)


def number(
    title: str, says: str, expr: str, unit: str = "short", *, width: int = 4, limits: Sequence[tuple[float, str]] = ()
) -> stat.Panel:
    """The value now; its colour from the first limit on that it reaches."""
    panel = _placed(stat.Panel(), title, says, unit, width, 4).targets(_numbered([query(expr, now=True)]))
    steps = [Threshold(None, "green"), *(Threshold(value, colour) for value, colour in limits)]
    return panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))


def bars(title: str, says: str, expr: str, legend: str, unit: str = "short", *, width: int = 8) -> bargauge.Panel:
    """Values now, one below the other."""
    panel = _placed(bargauge.Panel(), title, says, unit, width, 8).targets(_numbered([query(expr, legend, now=True)]))
    panel = panel.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.GRADIENT).min(0)
    return panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.CONTINUOUS_GR_YL_RD))


def histogram(title: str, says: str, series: str, unit: str, *, width: int = 8) -> heatmap.Panel:
    """How a histogram's buckets fill over time."""
    expr = f"sum by (le) (increase({series}_bucket[$__rate_interval]))"
    panel = _placed(heatmap.Panel(), title, says, "", width, 8).targets(_numbered([query(expr, "{{le}}", "heatmap")]))
    panel = panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    return panel.color(
        heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Spectral").steps(64)
        .scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5).fill("dark-orange").reverse(False)
    )  # fmt: skip


def matrix(title: str, says: str, expr: str, *, width: int = 12, height: int = 14) -> table.Panel:
    """A value of every layer (rows) and expert (columns) now, as a coloured table. `expr` is by (layer, expert)."""
    panel = _placed(table.Panel(), title, says, "", width, height).targets(
        _numbered([query(expr, form="table", now=True)])
    )
    options = {"rowField": "layer", "columnField": "expert", "valueField": "Value", "emptyValue": "null"}
    panel = panel.with_transformation(DataTransformerConfig(id_val="groupingToMatrix", options=options))
    # Numbers that were text before: layers in their order, not 0, 1, 10, 11, 2.
    number_of_layer = {"conversions": [{"targetField": "layer\\expert", "destinationType": "number"}]}
    panel = panel.with_transformation(DataTransformerConfig(id_val="convertFieldType", options=number_of_layer))
    order = {"sort": [{"field": "layer\\expert"}]}
    panel = panel.with_transformation(DataTransformerConfig(id_val="sortBy", options=order))
    panel = panel.decimals(2).color_scheme(dashboard.FieldColor().mode(FieldColorModeId.CONTINUOUS_BL_YL_RD))
    return panel.override_by_regexp("^\\d+$", [
        DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-background", "mode": "basic"}),
        DynamicConfigValue(id_val="custom.width", value=52),
    ])  # fmt: skip


def states(title: str, says: str, series: str, names: Sequence[str], *, width: int = 24) -> statetimeline.Panel:
    """Which state each process was in, over time. `series` is by (process, state), 1 for the state that it is in."""
    coded = " or ".join(f'({series}{{state="{name}"}} == 1) * {i}' for i, name in enumerate(names))
    panel = _placed(statetimeline.Panel(), title, says, "", width, 9)
    panel = panel.targets(_numbered([query(f"max by (process) ({coded})", "{{process}}")]))
    results = {
        str(i): ValueMappingResult(name, colour, index=i)
        for i, (name, colour) in enumerate(zip(names, _COLOURS, strict=True))
    }
    return panel.mappings([ValueMap(results)])


def rebalances() -> dashboard.AnnotationQuery:
    """Marks on every panel: when a rebalance succeeded."""
    expr = "max by (cluster) (changes(expertmesh_rebalance_last_success_timestamp_seconds[1m])) > 0"
    made = dashboard.AnnotationQuery().name("Rebalances").datasource(SOURCE).enable(True).icon_color("purple")
    made = made.expr(filtered(expr)).step("10s").title_format("rebalance {{cluster}}")
    return made.target(query(expr).ref_id("A"))


def _numbered(targets: Sequence[prometheus.Dataquery]) -> list[prometheus.Dataquery]:
    """With the names by which a panel tells its queries apart."""
    return [target.ref_id(chr(ord("A") + i)) for i, target in enumerate(targets)]


def board(
    uid: str, title: str, says: str, rows: Sequence[tuple[str, Sequence[Any]]], annotations: Sequence[Any] = ()
) -> dashboard.Dashboard:
    """A dashboard with the variables data source and cluster, in titled rows."""
    made = dashboard.Dashboard(f"ExpertMesh: {title}").uid(f"expertmesh-{uid}").description(says).tags(["expertmesh"])
    made = made.refresh("10s").time("now-30m", "now").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    made = made.editable().with_variable(
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    )
    made = made.with_variable(
        dashboard.QueryVariable("cluster").label("Cluster").datasource(SOURCE)
        .query("label_values(expertmesh_build_info, cluster)").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True).all_value(".*")
        .current(VariableOption(True, ["All"], ["$__all"]))
    )  # fmt: skip
    made = made.link(
        dashboard.DashboardLink("ExpertMesh").type(DashboardLinkType.DASHBOARDS).tags(["expertmesh"]).as_dropdown(True)
        .include_vars(True).keep_time(True)
    )  # fmt: skip
    for annotation in annotations:
        made = made.annotation(annotation)
    number_of = count(1)
    for name, panels in rows:
        made = made.with_row(dashboard.Row(name).id(next(number_of)))
        for panel in panels:
            made = made.with_panel(panel.id(next(number_of)))
    return made
