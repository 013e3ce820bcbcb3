"""Stock `lm_eval --model hf` gives an exported run the stored scores and the same generated texts.

Two differences are avoided here: an answer takes at most a quarter of a row, so rows are four times humaneval's 1,024
new tokens; and stock mbpp omits `test_setup_code`, which the problems used here do not have.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from stock_lm_eval import lm_eval, make_hub

from suite.cells import EvalConfig
from suite.cli.main import main
from suite.data.corpus import prepare as prepare_corpus
from suite.errors import UserError
from suite.evaluate import catalog, harness
from suite.evaluate.adapter import Codec, SuiteLM
from suite.evaluate.datasets import DataRoot
from suite.evaluate.sandbox import Sandbox
from suite.records import RunDir
from suite.train.checkpoint import load_model

LENGTH = 4096
CELL = f"""
model: {{family: dense, base: w32}}
data: {{kind: text, path: corpus.jsonl, seq_len: {LENGTH}, tokenizer: {{kind: bpe, vocab_size: 1024}}}}
train: {{batch_rows: 1, tokens: 40960, lr: 4e-3, warmup: 5}}
"""
EVALUATIONS = (
    EvalConfig(tasks=("nq_open", "triviaqa", "hellaswag", "piqa", "openbookqa"), num_fewshot=2, limit=4),
    EvalConfig(tasks=("mmlu",), num_fewshot=5, limit=1),
    EvalConfig(tasks=("humaneval", "mbpp"), limit=2),
)


def suite(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", *map(str, arguments)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert not exited.value.code


@pytest.mark.slow
def test_a_trained_run_exported_scores_the_same_under_stock_lm_eval(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    try:
        sandbox = Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    source = real_data.parent / "text/factbook/factbook_fields.jsonl.gz"
    if not source.exists():
        pytest.skip(f"no text in {source}")
    monkeypatch.chdir(tmp_path)
    with gzip.open(source, "rt") as lines:
        Path("corpus.jsonl").write_text("".join(line for _, line in zip(range(1500), lines, strict=False)))
    Path("cell.yaml").write_text(CELL)
    suite(monkeypatch, "train", "cell.yaml")
    (path,) = Path("results/runs").iterdir()
    for config in EVALUATIONS:
        shots = [] if config.num_fewshot is None else ["--num-fewshot", str(config.num_fewshot)]
        options = [*shots, "--limit", str(config.limit), "--data-root", real_data, "--run-code", "strongest"]
        suite(monkeypatch, "eval", path.name, "--tasks", ",".join(config.tasks), *options)
    suite(monkeypatch, "export", path.name, "--to", "exported")
    capsys.readouterr()

    run = RunDir(path)
    cell = run.read_cell()
    corpus = prepare_corpus(cell.data, Path("results/cache"))
    lm = SuiteLM(load_model(run, cell, corpus), Codec(corpus.tokenizer), LENGTH, harness.TOKEN_BUDGET)
    hub = make_hub(real_data, tmp_path / "hub")
    for config in EVALUATIONS:
        stored = json.loads((path / "eval" / f"{config.hash8}.json").read_text())["tasks"]
        stock = lm_eval(hub, tmp_path / "exported", config.tasks, config.num_fewshot, config.limit)
        for name in config.tasks:
            theirs = stock_metrics(stock["results"][name])
            for metric, score in stored[name]["metrics"].items():
                # sums of logarithms in another order
                assert score["value"] == pytest.approx(theirs.pop(metric), abs=1e-6), name
                error = theirs.pop(f"{metric}_stderr")
                assert score["stderr"] == (None if error == "N/A" else pytest.approx(error, abs=1e-6)), name
            assert not theirs
        prepared = harness.prepare(config, catalog.Sources(corpus, DataRoot(real_data), sandbox))
        for name, task in prepared.loaded.tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                assert lm.generate_until(task.instances) == stock["generated"][name], name


def stock_metrics(result: dict[str, object]) -> dict[str, object]:
    """Return numbers by metric, without the names of filters."""
    numbers = {key.partition(",")[0]: value for key, value in result.items() if "," in key}
    return {key.replace("pass_at_1", "pass@1"): value for key, value in numbers.items()}
