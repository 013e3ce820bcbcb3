"""A trained run, exported and loaded by transformers under lm-eval's own adapter: the stored scores, exactly.

Not compared: humaneval, whose stock definition asks for 1,024 new tokens; lm-eval's adapter refuses that for a model
with rows of 1,024, ours gives an answer a quarter of the row. Data comes from the same files for both.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

from suite.cells import EvalConfig
from suite.cli import main
from suite.data import prepare as prepare_corpus
from suite.errors import UserError
from suite.evaluate import catalog, harness
from suite.evaluate.data import DataRoot
from suite.evaluate.sandbox import Sandbox
from suite.records import RunDir

LENGTH = 1024
CELL = f"""
model: {{family: dense, base: w32}}
data: {{kind: text, path: corpus.jsonl, seq_len: {LENGTH}, tokenizer: {{kind: bpe, vocab_size: 1024}}}}
train: {{batch_rows: 1, tokens: 40960, lr: 4e-3, warmup: 5}}
"""
ASKED = (
    EvalConfig(tasks=("nq_open", "triviaqa", "hellaswag", "piqa", "openbookqa"), num_fewshot=2, limit=4),
    EvalConfig(tasks=("mmlu",), num_fewshot=5, limit=1),
    EvalConfig(tasks=("mbpp",), limit=1),
)


def suite(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code


@pytest.mark.slow
def test_a_trained_run_exported_scores_the_same_under_stock_lm_eval(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

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
    for config in ASKED:
        shots = [] if config.num_fewshot is None else ["--num-fewshot", str(config.num_fewshot)]
        options = [*shots, "--limit", str(config.limit), "--data-root", real_data, "--run-code"]
        suite(monkeypatch, "eval", path.name, "--tasks", ",".join(config.tasks), *options)
    suite(monkeypatch, "export", path.name, "--to", "exported")
    capsys.readouterr()

    run = RunDir(path)
    corpus = prepare_corpus(run.read_cell().data, Path("results/cache"))
    stock = HFLM(
        pretrained="exported", max_length=LENGTH, add_bos_token=True, batch_size=4, device="cpu", dtype=torch.float32
    )
    for config in ASKED:
        stored = json.loads((path / "eval" / f"{config.hash8}.json").read_text())["tasks"]
        prepared = harness.prepare(config, catalog.Sources(corpus, DataRoot(real_data), sandbox))
        theirs = harness.scores_of(stock, prepared)
        assert stored.keys() == theirs.keys()
        for name, entry in theirs.items():
            # sums of logarithms in another order
            assert stored[name].pop("metrics") == {
                metric: {key: pytest.approx(value, abs=1e-6) for key, value in values.items()}
                for metric, values in entry.pop("metrics").items()
            }, name
            assert {key: stored[name][key] for key in entry} == entry
