"""Write docs/metrics.md from the table of series; with --check only say whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.observe.cardinality import MOST_EXPERTS, Cluster
from cluster.observe.series.base import OWN_LABEL, Series
from cluster.observe.series.table import TABLE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- table: scripts/metrics.py writes this -->\n", "<!-- table ends -->\n"
_SIZES = (
    ("Mixtral 8x7B (32 x 8), 8 workers", Cluster(32, 8, 8)),
    ("Mixtral 8x7B (32 x 8), 8 workers, 2 replicas of each, 2 routers", Cluster(32, 8, 8, n_routers=2, replicas=2)),
    ("DeepSeek-V3 (58 x 256), 32 workers", Cluster(58, 256, 32)),
)


def _row(series: Series) -> str:
    labels = ", ".join(f"`{label}`" for label in series.all_labels) or "none"
    alias = f" As `{series.vllm}`." if series.vllm else ""
    return f"| `{series.name}` | {series.kind} | {series.unit or '-'} | {labels} | {series.help}.{alias} |\n"


def table() -> str:
    """Everything between the marks of the page."""
    text = "## Series\n"
    for setter in OWN_LABEL:
        text += f"\n### Set by {'the' if setter == 'controller' else ''} {setter}".replace("  ", " ") + "\n\n"
        text += "| name | type | unit | labels | what |\n|---|---|---|---|---|\n"
        text += "".join(_row(series) for series in TABLE if series.set_by == setter)
    text += "\n## How many samples\n\n"
    text += f"`--per-expert-metrics auto` leaves those per expert out above {MOST_EXPERTS} experts in all layers.\n\n"
    text += "| cluster | per expert: on | off |\n|---|---|---|\n"
    for name, cluster in _SIZES:
        text += f"| {name} | {cluster.samples(True):,} | {cluster.samples(False):,} |\n"
    return text


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    fresh = f"{before}{BEGIN}{table()}{END}{after}"
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(fresh, encoding="utf-8")
    elif fresh != page:
        raise SystemExit("docs/metrics.md is not current; run `python scripts/metrics.py` and commit the result")


if __name__ == "__main__":
    main()
