"""The gate's benchmark measures what it says; its numbers are not a test's affair."""

from __future__ import annotations

from pathlib import Path

from bench.gate import COLUMNS, Row, measure_all, render


def test_every_row_has_its_columns(tmp_path: Path) -> None:
    rows = measure_all(tmp_path, calls=200, turns=2)
    assert len(rows) == 6
    assert all(0 < time < 1e8 for row in rows for time in row.times)
    table = render(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert {line.count("|") for line in table} == {len(COLUMNS) + 3}


def test_the_fuses_are_compared_with_the_cheaper_gate_without_one() -> None:
    assert Row(name="x", times=(1.0, 30.0, 20.0, 25.0)).fuses_cost == 5.0
