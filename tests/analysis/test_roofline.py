"""The figures of speed from the files that the benches write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.cli.main import main
from kernels.bench.main import Result, write_csv


def measured(operator: str, contender: str, rows: int, milliseconds: float) -> Result:
    moved = 4_000_000
    speed = moved / milliseconds / 1e6
    return Result(
        operator=operator,
        contender=contender,
        device="cpu",
        use="zipf",
        width=64,
        rows=rows,
        lookups=100,
        bag=4,
        unique=50,
        p20_ms=0.9 * milliseconds,
        p50_ms=milliseconds,
        p80_ms=1.2 * milliseconds,
        ratio_p20=1.0,
        ratio_p50=1.0,
        ratio_p80=1.0,
        bytes=moved,
        gb_per_s=speed,
        copy_share=speed / 8.0,
        parts_ms="",
        peak_bytes=0,
    )


def test_what_the_bench_writes_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        measured(operator, contender, rows, time)
        for operator in ("forward", "step", "search")
        for contender, time in (("ours", 1.0), ("other", 2.0))
        for rows in (1 << 14, 1 << 16)
    ]
    (tmp_path / "bench").mkdir()
    write_csv(tmp_path / "bench" / "kernels-cpu.csv", results)
    assert main(["kernels", "--results", str(tmp_path), "--out", str(tmp_path / "f"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [line.split(":")[0] for line in document["missing"]] == ["step-cost"]
    files = [Path(path) for path in document["figures"]["kernel-roofline-cpu"]]
    assert {path.suffix for path in files} == {".png", ".pdf", ".svg"}
    drawing = next(path for path in files if path.suffix == ".svg").read_text()
    for words in ("copy bandwidth", "ours", "other (step)", "zipf reads, width 64", "kernels-cpu.csv"):
        assert words in drawing


STEPS = """family,base,half_keys,memory_rows,optimizer,step_ms,ratio_p50,peak_bytes
dense,w32,,0,,30.0,1.0,28000000
pkm,w32,32,1024,row_wise,36.0,0.8,27000000
pkm,w32,512,262144,row_wise,50.0,0.6,130000000
pkm,w32,32,1024,dense,37.0,0.8,27000000
pkm,w32,512,262144,dense,90.0,0.4,150000000
"""


def test_training_steps_are_drawn_against_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "step.csv").write_text(STEPS)
    assert main(["kernels", "--results", str(tmp_path), "--out", str(tmp_path / "f"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [line.split(":")[0] for line in document["missing"]] == ["kernel-roofline"]
    drawing = next(Path(path) for path in document["figures"]["step-cost"] if path.endswith(".svg")).read_text()
    for words in ("pkm, row-wise", "pkm, dense optimizer", "table rows", "peak tensor memory, MiB", "step.csv"):
        assert words in drawing


def test_training_steps_without_a_needed_column_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "step.csv").write_text(STEPS.replace("peak_bytes", "memory"))
    assert main(["kernels", "--results", str(tmp_path), "--out", str(tmp_path / "f")]) == 2
    assert "step.csv: no column peak_bytes" in capsys.readouterr().err


def test_a_missing_file_is_named_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--results", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    shown = capsys.readouterr().err
    assert shown.startswith("missing: kernel-roofline")
    assert f"python -m kernels.bench --out {tmp_path / 'bench'}" in shown


@pytest.mark.parametrize(
    ("old", "new", "words"), [("gb_per_s", "speed", "no column gb_per_s"), ("4000000", "0", "column bytes")]
)
def test_other_columns_or_values_are_refused(
    old: str, new: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").mkdir()
    path = tmp_path / "bench" / "kernels-cpu.csv"
    write_csv(path, [measured("forward", "ours", 1 << 14, 1.0)])
    path.write_text(path.read_text().replace(old, new))
    assert main(["kernels", "--results", str(tmp_path), "--out", str(tmp_path / "f")]) == 2
    assert words in capsys.readouterr().err
