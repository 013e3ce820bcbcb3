"""`suite import`: a checkpoint made by transformers becomes a run that is scored, exported and started from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from suite.cells import Cell, EvalConfig
from suite.cli.main import app
from suite.data.corpus import prepare as prepare_corpus
from suite.errors import UserError
from suite.export.export import export
from suite.export.importing import import_checkpoint
from suite.export.tokenizer import write_tokenizer
from suite.launch import scoring, worker
from suite.launch.preparation import prepare
from suite.launch.provenance import stale_because
from suite.launch.scorer import Scorer
from suite.records import RunDir
from suite.train.checkpoint import load_model

transformers = pytest.importorskip("transformers")

TEXT = "the king of the sea and the queen of the land have a house by the river. " * 30
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def make_checkpoint(folder: Path, spare: int = 3, shard: str = "30KB", dtype: torch.dtype = torch.bfloat16) -> Any:
    """Save a tiny random Llama, tied and sharded, and a BPE that puts its first token before every text."""
    from suite.data.tokenizers import BPETokenizer

    tokenizer = BPETokenizer.train([TEXT], 270)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + spare,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eot_id,
        eos_token_id=tokenizer.eot_id,
        **SHAPE,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(tokenizer, folder, 64)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def run(checkpoint: Path, results: Path) -> RunDir:
    return import_checkpoint(checkpoint, results)


def test_logits_and_tokens_are_those_of_transformers(run: RunDir, checkpoint: Path, results: Path) -> None:
    cell = run.read_cell()
    corpus = prepare_corpus(cell.data, results / "cache")
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("the queen of the sea")["input_ids"]
    assert ids == [corpus.tokenizer.eot_id, *corpus.tokenizer.encode("the queen of the sea")]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        ours = load_model(run, cell, corpus)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=0, atol=1e-5)


def test_the_run_is_done_marked_as_imported_and_never_stale(run: RunDir) -> None:
    record = run.read_record()
    assert run.state()["state"] == "done"
    assert run.name.startswith("imported-2x48-")
    assert len(record["cell"]["imported"]) == 64
    run.write_cell(run.read_cell(), versions={"code": "other"})
    assert stale_because(run, run.read_cell()) is None
    assert worker.run_cell(run.path) == "done"


def test_the_run_is_known_by_its_content(checkpoint: Path, run: RunDir, results: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, elsewhere)
    assert import_checkpoint(elsewhere, results).path == run.path
    whole = tmp_path / "whole"
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    shutil.copytree(checkpoint, whole, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    model.save_pretrained(whole)
    assert import_checkpoint(whole, results).path == run.path
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(whole)
    assert import_checkpoint(whole, results).path != run.path


def test_an_export_of_the_run_equals_the_checkpoint(
    run: RunDir, checkpoint: Path, results: Path, tmp_path: Path
) -> None:
    cell = run.read_cell()
    corpus = prepare_corpus(cell.data, results / "cache")
    export(load_model(run, cell, corpus), tmp_path / "out", corpus, cell.data.seq_len)
    before = {name: value for path in checkpoint.glob("*.safetensors") for name, value in load_file(path).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], value.float()), name


@pytest.mark.parametrize("puts_token_first", [True, False])
def test_an_export_that_is_imported_is_the_same_run_or_the_reason_is_stated(
    puts_token_first: bool, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "llama"
    shutil.copytree(checkpoint, source)
    if not puts_token_first:
        tokenizer = json.loads((source / "tokenizer.json").read_text()) | {"post_processor": None}
        (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    first = import_checkpoint(source, tmp_path / "results")
    cell = first.read_cell()
    corpus = prepare_corpus(cell.data, tmp_path / "results" / "cache")
    export(load_model(first, cell, corpus), tmp_path / "out", corpus, cell.data.seq_len)
    done = CliRunner().invoke(app, ["import", str(tmp_path / "out"), "--results", str(tmp_path / "results")])
    assert done.exit_code == 0
    assert (done.stdout.strip() == first.name) == puts_token_first
    lines = [line for line in done.stderr.splitlines() if "same weights" in line]
    reason = f"{first.name} has the same weights, but is another run; fields that differ: data.tokenizer.fingerprint"
    assert lines == ([] if puts_token_first else [reason])


def test_a_run_that_is_moved_alone_needs_neither_the_checkpoint_nor_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "llama"
    shutil.copytree(checkpoint, source)
    first = import_checkpoint(source, tmp_path / "results")
    expected = load_model(first, first.read_cell(), scoring.corpus_of(first, first.read_cell())).state_dict()
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    shutil.move(first.path, tmp_path / "elsewhere" / "runs" / first.name)
    shutil.rmtree(source)
    moved = RunDir(tmp_path / "elsewhere" / "runs" / first.name)
    cell = moved.read_cell()
    assert scoring.corpus_of(moved, cell).tokenizer.encode("the sea")
    state = load_model(moved, cell, scoring.corpus_of(moved, cell)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_scores_are_those_of_stock_lm_eval(run: RunDir, results: Path) -> None:
    from suite.evaluate.adapter import Codec, SuiteLM

    cell = run.read_cell()
    corpus = prepare_corpus(cell.data, results / "cache")
    model = load_model(run, cell, corpus)
    adapter = SuiteLM(model, Codec(corpus.tokenizer), cell.data.seq_len, 1024)
    scored = adapter.loglikelihood([_request("the queen of", " the land")])
    theirs = _stock_score(run, "the queen of", " the land")
    assert scored[0][0] == pytest.approx(theirs[0], abs=1e-4)
    assert scored[0][1] == theirs[1]


def _request(context: str, continuation: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, (context, continuation), 0)


def _stock_score(run: RunDir, context: str, continuation: str) -> tuple[float, bool]:
    from lm_eval.models.huggingface import HFLM

    folder = run.read_record()["cell"]["data"]["tokenizer"]["path"]
    lm = HFLM(pretrained=folder, dtype="float32", device="cpu", add_bos_token=True)
    return lm.loglikelihood([_request(context, continuation)], disable_tqdm=True)[0]


def child(run: RunDir, folder: Path, **train: Any) -> Cell:
    cell = run.read_cell()
    (folder / "facts.jsonl").write_text('{"answer": " river.", "paraphrases": ["the king has a"]}\n')
    data = {"kind": "facts", "path": str(folder / "facts.jsonl"), "paraphrases": 1, "tokenizer": cell.data.tokenizer}
    settings = {"batch_rows": 1, "epochs": 4, "lr": 1e-3, "probe_every": 2, "init_from": "llama", "parent": cell.hash8}
    return Cell.model_validate({"model": cell.model, "data": data, "train": settings | train})


def test_the_run_is_a_parent(run: RunDir, results: Path, tmp_path: Path) -> None:
    made = prepare(results, child(run, tmp_path))
    assert worker.run_cell(made.path) == "done", made.state()
    lines = [line for line in made.train_lines() if "new" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert "known" not in lines[0]
    assert lines[-1]["new"]["storage"]["bits"][0] > lines[0]["new"]["storage"]["bits"][0]


def test_tfidf_without_background_data_is_one_line(run: RunDir, results: Path, tmp_path: Path) -> None:
    model = {
        "family": "memory_plus",
        "half_keys": 8,
        "top_k": 2,
        "memory_heads": 1,
        "placement": (1,),
        "keep_ffn": True,
    }
    base = child(run, tmp_path, trainable={"kind": "rows", "top": 2}, table_optimizer="sgd", value_lr=1.0)
    fields = base.model_dump() | {"model": base.model.model_dump() | model}
    made = prepare(results, Cell.model_validate(fields))
    assert worker.run_cell(made.path) == "failed"
    assert "train.trainable.score: got 'tfidf'" in made.state()["cause"]


def test_tasks_about_training_text_do_not_fit(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"task held_out: data.kind: got 'tokenizer'"):
        scoring.evaluate_run(run.path, (EvalConfig(tasks=("held_out",)),), Scorer())


@pytest.mark.parametrize("broken", ["model", "tokenizer", "entries", "folder"])
def test_a_broken_checkpoint_is_one_line(broken: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(checkpoint, folder)
    words = {
        "model": r"config.json: missing",
        "tokenizer": r"data.tokenizer.path: got",
        "entries": r"data.tokenizer.entries: got \d+, allowed: at least",
        "folder": r"DIR: got",
    }
    if broken == "model":
        (folder / "config.json").unlink()
    elif broken == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif broken == "folder":
        folder = folder / "config.json"
    else:
        shutil.rmtree(folder)
        make_checkpoint(folder, spare=-20)
        config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": None}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words[broken]) as caught:
        import_checkpoint(folder, tmp_path / "results")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", "[" * 100_000, "config.json: not readable as JSON"),
        (
            "config.json",
            {"model_type": "next_parameter", "intermediate_size": None},
            "model_type: got 'next_parameter', allowed: llama",
        ),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads: got 0, allowed: a whole number above 0"),
        ("config.json", {"hidden_size": "48"}, "hidden_size: got '48', allowed: a whole number above 0"),
        ("config.json", {"hidden_size": None}, "hidden_size: got None"),
        ("config.json", {"num_key_value_heads": 3}, "kv_heads: got 3, allowed: a divisor of heads"),
        (
            "config.json",
            {"vocab_size": 999},
            r"model.embed_tokens.weight: got a tensor of \[\d+, 48\], allowed: \[999, 48\]",
        ),
        ("config.json", {"bos_token_id": [1]}, r"bos_token_id: got \[1\], allowed: the number of a token"),
        ("config.json", {"max_position_embeddings": None}, "max_position_embeddings: missing; give --seq-len"),
        ("model.safetensors.index.json", "[]", "index.json: got list, allowed: a JSON object"),
        ("model.safetensors.index.json", "{}", "weight_map: got None, allowed: a file for every tensor"),
        ("tokenizer.json", '{"kind": "bpe"}', "its tokenizer is not readable"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_one_line(
    file: str, content: str | dict[str, Any], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(checkpoint, folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        import_checkpoint(folder, tmp_path / "results")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(checkpoint, folder)
    shard = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"llama: model.norm.weight: contains NaN or infinite values"):
        import_checkpoint(folder, tmp_path / "results")
    assert not (tmp_path / "results" / "runs").exists()


def test_truncated_weights_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(checkpoint, folder)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name}: not whole safetensors .*; copy the file again"):
        import_checkpoint(folder, tmp_path / "results")
