"""`suite quantise`, and evaluation with tables outside of the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cli_runner import Suite

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.inference.tables.forms import encode_table, form_of
from suite.launch.provenance import stale_because
from suite.records import RunDir
from suite.train.checkpoint import load_model
from suite.train.probe import Prober

CELL = """
model: {family: FAMILY, base: w32, half_keys: 8, top_k: 4}
data: {kind: bios, people: 20, questions: 0.5, seq_len: 64}
train: {batch_rows: 4, epochs: 2, lr: 0.005, checkpoint_every: 100, probes: 2}
evaluate: [{tasks: [bios_storage, bios_choice]}]
"""


def trained(suite: Suite, family: str = "pkm", number: int = 1) -> RunDir:
    text = CELL.replace("FAMILY", family)
    if family == "engram":
        text = text.replace("half_keys: 8, top_k: 4", "head_rows: 40, hash_heads: 2")
    Path("cell.yaml").write_text(text)
    done = suite("train", "cell.yaml", "--json")
    assert done.returncode == 0, done.stderr
    return RunDir(Path("results/runs") / json.loads(done.stdout)["cells"][0]["run"])


def scores(run: RunDir) -> dict:
    (path,) = run.eval_paths()
    return {task: scored["metrics"] for task, scored in run.read_eval(path)["tasks"].items()}


def test_a_quantised_run_is_scored_next_to_its_source(suite: Suite) -> None:
    source = trained(suite)
    made = suite("quantise", source.name, "--to", "int8", "--json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    run = RunDir(Path("results/runs") / document["run"])
    assert run.name.startswith("pkm-w32-k8-s0-int8-")
    assert (document["source"], document["form"]) == (source.name, "int8")
    assert (document["bytes"], document["source_bytes"]) == (64 * 36, 64 * 128)
    read = [record["account"]["bytes_per_token"] for record in (run.read_record(), source.read_record())]
    assert read[0] - read[1] == 4 * 4 * (36 - 2 * 32)  # heads x top_k rows, int8 instead of bf16

    before, after = scores(source), scores(run)
    for task, metrics in document["tasks"].items():
        assert set(metrics) == set(after[task])
        for metric, values in metrics.items():
            assert values["reference"] == before[task][metric]["value"]
            difference = after[task][metric]["value"] - before[task][metric]["value"]
            assert values["difference"] == pytest.approx(difference, abs=1e-12)
    assert document["loss"]["reference"] == pytest.approx(source.last_train_line()["eval_loss"], rel=1e-6)
    (line,) = run.train_lines()
    assert document["loss"]["value"] == pytest.approx(line["eval_loss"], rel=1e-6)
    assert line["step"] == source.last_train_line()["step"]

    cell = run.read_cell()
    assert cell.source == source.read_cell()
    assert run.read_record()["started_from"]["hash"] == source.read_cell().hash8
    assert stale_because(run, cell) is None
    assert run.state()["state"] == "done"
    assert run.usage_path.exists()
    corpus = prepare(cell.data, Path("results/cache"))
    (ours,), (theirs,) = (load_model(r, r.read_cell(), corpus).memory_tables() for r in (run, source))
    expected = form_of("int8").decode(encode_table(form_of("int8"), theirs.weight.detach()), 32)
    every_row_N1 = torch.arange(64).unsqueeze(1)
    assert torch.equal(ours(every_row_N1, torch.ones(64, 1)), expected)

    again = suite("quantise", source.name, "--to", "int8", "--json")
    assert json.loads(again.stdout) == document
    Path("child.yaml").write_text(
        Path("cell.yaml").read_text().replace("lr: 0.005", f"lr: 0.005, init_from: {run.name}")
    )
    for wrong in (suite("quantise", run.name, "--to", "int4"), suite("train", "child.yaml")):
        assert wrong.returncode == 2
        assert len(wrong.stderr.splitlines()) == 1
        assert all(name in wrong.stderr for name in (run.name, source.name))


def test_a_source_without_its_last_checkpoint_is_refused(suite: Suite) -> None:
    source = trained(suite)
    made = json.loads(suite("quantise", source.name, "--to", "int8", "--json").stdout)
    (last,) = source.checkpoints.iterdir()
    last.rename(last.with_name("step-1"))
    for code, *command in (
        (1, "quantise", source.name, "--to", "int4"),
        (2, "eval", made["run"], "--tasks", "bios_extraction"),
    ):
        refused = suite(*command)
        assert refused.returncode == code
        assert f"{source.checkpoints}: the checkpoint of the last step" in refused.stderr
        assert "is damaged or missing" in refused.stderr


def test_rows_are_dropped_by_counts_of_other_training_text(suite: Suite) -> None:
    source = trained(suite)
    made = suite("quantise", source.name, "--to", "int8", "--keep", "25%", "--json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    run = RunDir(Path("results/runs") / document["run"])
    assert run.name.startswith("pkm-w32-k8-s0-int8-keep25-")
    assert (document["form"], document["kept_rows"], document["bytes"]) == ("int8", 0.25, 17 * 36 + 64 * 4)
    cell = run.read_cell()
    assert cell.source == source.read_cell()
    corpus = prepare(cell.data, Path("results/cache"))
    (ours,), (theirs,) = (load_model(r, r.read_cell(), corpus).memory_tables() for r in (run, source))
    every_row_N1 = torch.arange(64).unsqueeze(1)
    rows_RD = ours(every_row_N1, torch.ones(64, 1))
    is_kept_R = rows_RD.any(1)

    reads_R, scored = torch.zeros(64, dtype=torch.int64), Prober(corpus).rows
    theirs.before_read.append(lambda indices_NS: reads_R.add_(indices_NS.flatten().bincount(minlength=64)))
    model = load_model(source, source.read_cell(), corpus)
    (table,) = model.memory_tables()
    table.before_read = theirs.before_read
    loader, batches = corpus.loader(0, 16), document["counted_tokens"] // (16 * 64)
    for step in range(len(scored.tokens_BT) // 16, len(scored.tokens_BT) // 16 + batches):
        batch = loader.batch(step)
        model(batch.tokens_BT, batch.segments_BT)
    assert int(is_kept_R.sum()) == 16
    assert reads_R[is_kept_R].min() >= reads_R[~is_kept_R].max()
    assert document["loss"]["difference"] > 0
    assert scores(run).keys() == scores(source).keys()


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("pkm", ("host",)),
        ("pkm", ("file",)),
        ("pkm", ("file", "--cache", "lru:10%")),
        ("pkm", ("host", "--cache", "static:20%")),
        ("engram", ("file", "--prefetch")),
    ],
)
def test_scores_do_not_depend_on_where_tables_are(family: str, place: tuple[str, ...], suite: Suite) -> None:
    source = trained(suite, family)
    expected, usage = scores(source), json.loads(source.usage_path.read_text())
    shutil.rmtree(source.path / "eval")
    source.usage_path.unlink()
    done = suite("eval", source.name, "--table", *place)
    assert done.returncode == 0, done.stderr
    assert scores(source) == expected
    assert json.loads(source.usage_path.read_text()) == usage
    assert f"tables in {place[0]}" in done.stderr
    assert ("from the cache" in done.stderr) == ("--cache" in place)
    assert ("100.0% prefetched" in done.stderr) == ("--prefetch" in place)


def test_rows_that_follow_from_the_hidden_state_are_not_prefetched(suite: Suite) -> None:
    run = RunDir(Path("results/runs/pkm-w32-k8-s0-00000000"))
    run.path.mkdir(parents=True)
    run.write_cell(Cell.model_validate(yaml.safe_load(CELL.replace("FAMILY", "pkm"))))
    refused = suite("eval", run.name, "--table", "file", "--prefetch")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert all(word in refused.stderr for word in ("--prefetch", "pkm", "engram"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantise", "RUN", "--to", "int7"], ["--to", "'int7'", "int4"]),
        (["quantise", "RUN", "--to", "int8"], ["RUN", "no value tables"]),
        (["quantise", "RUN"], ["--to", "--keep"]),
        (["quantise", "RUN", "--keep", "100%"], ["--keep", "'100%'", "N%"]),
        (["quantise", "RUN", "--keep", "0.25"], ["--keep", "'0.25'", "N%"]),
        (["eval", "RUN", "--table", "file"], ["--table", "no value tables"]),
        (["eval", "RUN", "--table", "disk"], ["--table", "'disk'", "host, file"]),
        (["eval", "RUN", "--cache", "lru:5%"], ["--cache", "--table"]),
        (["eval", "RUN", "--prefetch"], ["--prefetch", "--table"]),
        (["eval", "--oracle", "--table", "file"], ["--oracle", "--table"]),
    ],
)
def test_wrong_combinations_are_one_line(arguments: list[str], words: list[str], suite: Suite) -> None:
    run = RunDir(Path("results/runs/dense-w32-s0-00000000"))
    cell = {"model": {"family": "dense", "base": "w32"}, "data": {"kind": "bios", "people": 20}}
    run.path.mkdir(parents=True)
    run.write_cell(Cell.model_validate(cell | {"train": {"batch_rows": 4, "epochs": 2.0, "lr": 5e-3}}))
    result = suite(*(run.name if argument == "RUN" else argument for argument in arguments))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words)


@pytest.mark.parametrize(("field", "value"), [("quantised", "int8"), ("kept_rows", 0.5)])
def test_a_grid_needs_the_trained_runs_of_its_smaller_tables(field: str, value: object, suite: Suite) -> None:
    cell = yaml.safe_load(CELL.replace("FAMILY", "pkm"))
    source = Cell.model_validate(cell)
    Path("grid.yaml").write_text(yaml.safe_dump({"defaults": cell, "blocks": [{"set": {field: value}}]}))
    refused = suite("sweep", "grid.yaml", "--no-report")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert all(word in line for word in (f"{field}: got {value!r}", source.slug, "null"))


@pytest.mark.parametrize(("field", "value"), [("quantised", "int8"), ("kept_rows", 0.5)])
def test_a_model_without_tables_has_no_smaller_tables(field: str, value: object) -> None:
    cell = {"model": {"family": "dense", "base": "w32"}, "data": {"kind": "bios", "people": 20}}
    with pytest.raises(ValueError, match=f"{field}: got {value!r}"):
        Cell.model_validate(cell | {"train": {"batch_rows": 4, "epochs": 2.0, "lr": 5e-3}, field: value})
