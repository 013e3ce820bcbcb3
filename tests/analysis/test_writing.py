"""What analysis writes is whole or absent, and a refused write is one line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from small_disk import small_disk

from analysis.errors import InputError
from analysis.figures import style
from analysis.records.tables import write_table
from analysis.records.writing import write_text


def test_a_refused_write_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "report.md", "old")
    with small_disk(), pytest.raises(InputError, match=r"report\.md: cannot be written: "):
        write_text(tmp_path / "report.md", "new" * 10_000)
    assert (tmp_path / "report.md").read_text() == "old"
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_refused_table_is_absent(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"value": [f"{number * 7919 % 30_011:x}" for number in range(30_000)]})
    with small_disk(), pytest.raises(InputError, match=rf"--out .*table\{suffix}: cannot be written: "):
        write_table(table, tmp_path / f"table{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_figure_is_absent(tmp_path: Path) -> None:
    with style.figure(1, 1) as (drawn, (axis,)):
        axis.plot(range(50))
        with small_disk(2_000), pytest.raises(InputError, match=r"figure\.png: cannot be written: "):
            style.save(drawn, tmp_path, "figure", "A note.")
        assert list(tmp_path.iterdir()) == []
        assert all(path.stat().st_size for path in style.save(drawn, tmp_path, "figure", "A note."))
