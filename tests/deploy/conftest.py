"""The table of what was rendered and checked, at the end of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

Row = dict[str, str]
_TABLE = pytest.StashKey[dict[str, Row]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Row:
    """The row of the test's case in the table, to be filled in."""
    table = request.config.stash.setdefault(_TABLE, {})
    return table.setdefault(str(request.node.callspec.params["name"]), {})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    table = terminalreporter.config.stash.get(_TABLE, {})
    if not table:
        return
    terminalreporter.section("the chart, rendered and checked")
    for line in _lines(table):
        terminalreporter.write_line(line)


def _lines(table: dict[str, Row]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = [
        ["values", *columns],
        *([name, *(row.get(column, "-") for column in columns)] for name, row in table.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
