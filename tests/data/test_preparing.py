"""`suite data prepare`: prepares every corpus once, reports it, and resumes when the command is repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GRID = """
defaults:
  model: {{family: dense, base: w32}}
  data: {{kind: text, path: {path}, tokenizer: {{kind: bytes}}}}
  train: {{batch_rows: 4, tokens: 1000, lr: 1e-3}}
blocks:
  - axes: {{seed: [0, 1], data.seq_len: [32, 64]}}
"""
TEXT = """
model: {{family: dense, base: w32}}
data: {{kind: text, path: {path}, tokenizer: {{kind: bytes}}}}
train: {{batch_rows: 4, tokens: 1000, lr: 1e-3}}
"""
MIXTURE = """
model: {{family: dense, base: w32}}
data:
  kind: mixture
  seq_len: 32
  tokenizer: {{kind: bytes}}
  parts:
    first: {{kind: text, path: {path}, weight: 2}}
    second: {{kind: text, path: {path}, field: other, weight: 1}}
train: {{batch_rows: 4, tokens: 1000, lr: 1e-3}}
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "suite.cli.main", "data", "prepare", *map(str, arguments)]


def prepare(*arguments: object) -> tuple[dict[str, Any], str]:
    done = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


def corpus(path: Path, documents: int = 200) -> Path:
    lines = (json.dumps({"text": f"document {i} " + "x" * (i % 90), "other": f"other {i}"}) for i in range(documents))
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_the_command_prepares_a_mixture_part_by_part(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text.jsonl")
    cell = tmp_path / "cell.yaml"
    cell.write_text(MIXTURE.format(path=text))
    document, progress = prepare(cell, "--results", tmp_path / "results")
    (only,) = document["corpora"]
    assert only["label"] == "mixture of first, second"
    assert only["vocab_size"] == 257
    assert [part["part"] for part in only["parts"]] == ["first", "second"]
    for part in only["parts"]:
        assert part["documents"] + part["held_out"] == 200
        assert len(part["content"]) == 64
        folder = Path(part["folder"])
        assert (folder / "round-0.tokens").stat().st_size == 2 * part["tokens"]
    assert f"second {text}: ready" in progress


def test_training_a_tokenizer_is_announced(tmp_path: Path) -> None:
    cell = tmp_path / "cell.yaml"
    cell.write_text(TEXT.format(path=corpus(tmp_path / "text.jsonl")).replace("bytes", "bpe, vocab_size: 300"))
    _, progress = prepare(cell, "--results", tmp_path / "results")
    stages = ("preparing 1 files", "reading the text to train", "training its tokenizer on 0.0M characters", "ready")
    places = [progress.index(stage) for stage in stages]
    assert places == sorted(places)
    _, progress = prepare(cell, "--results", tmp_path / "results")
    assert "training its tokenizer" not in progress, "it is prepared"


def test_the_command_prepares_each_corpus_of_a_grid_once(tmp_path: Path) -> None:
    grid = tmp_path / "two.yaml"
    grid.write_text(GRID.format(path=corpus(tmp_path / "text.jsonl")))
    document, _ = prepare(grid, "--results", tmp_path / "results")
    assert document["grid"] == "two"
    assert sorted(report["data"]["seq_len"] for report in document["corpora"]) == [32, 64]
    assert [len(report["runs"]) for report in document["corpora"]] == [2, 2]
    assert len({part["folder"] for report in document["corpora"] for part in report["parts"]}) == 1


@pytest.mark.slow
def test_an_interrupted_command_resumes_and_writes_the_same_bytes(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    with open(text, "w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"document {i} " + "some words " * 60}) + "\n")
    cell = tmp_path / "cell.yaml"
    cell.write_text(TEXT.format(path=text))
    whole, _ = prepare(cell, "--results", tmp_path / "whole")
    process = subprocess.Popen(command(cell, "--results", tmp_path / "interrupted"), start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "interrupted").glob("cache/*.partial/meta.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (partial,) = (tmp_path / "interrupted").glob("cache/*.partial")
    committed = json.loads((partial / "meta.json").read_text())["tokens"]
    resumed, _ = prepare(cell, "--results", tmp_path / "interrupted")
    (first,), (second,) = (report["corpora"][0]["parts"] for report in (whole, resumed))
    assert 0 < committed < second["tokens"]
    for path in Path(first["folder"]).iterdir():
        assert path.read_bytes() == (Path(second["folder"]) / path.name).read_bytes(), path.name


def test_errors_of_the_command_are_one_line_with_exit_code_2(tmp_path: Path) -> None:
    cell = tmp_path / "cell.yaml"
    cell.write_text(MIXTURE.format(path=tmp_path / "none.jsonl"))
    done = subprocess.run(command(cell), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("suite: ")
    assert "none.jsonl', which does not exist" in done.stderr
    assert done.stderr.count("\n") == 1
