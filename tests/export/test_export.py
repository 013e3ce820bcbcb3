"""Exports load in transformers with the same logits, and Llama checkpoints can be imported."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from page_examples import POINTS, file_of
from small_disk import small_disk
from stock_lm_eval import lm_eval_model
from typer.testing import CliRunner

from suite import models
from suite.baselines import loading
from suite.cells import Cell, EvalConfig
from suite.cli.main import app
from suite.data.corpus import Corpus, prepare
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.export.export import export
from suite.export.llama import import_llama
from suite.export.tokenizer import fast_tokenizer
from suite.inference.tables.reading import reduce_tables
from suite.models import Transformer, registry

transformers = pytest.importorskip("transformers", reason="transformers, an extra, is not installed")
pytestmark = pytest.mark.usefixtures("isolated_transformers")
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"half_keys": 16, "top_k": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"family": "dense", "base": "w32"},
    "dense tied, grouped": {"family": "dense", "base": "w64", "tie_embeddings": True, "kv_heads": 2},
    "moe": {"family": "moe", "base": "w32", "experts": 4},
    "moe_topk": {"family": "moe_topk", "base": "w32", "shared_experts": 1},
    "moe_topk softmax": {"family": "moe_topk", "base": "w32", "router": "softmax"},
    "pkm": {"family": "pkm", "base": "w32", **SMALL, "query_batchnorm": True},
    "memory_plus": {"family": "memory_plus", "base": "w32", **SMALL, "qk_norm": True},
    "peer": {"family": "peer", "base": "w32", **SMALL},
    "pkm shuffled": {"family": "pkm", "base": "w32", **SMALL, "control": "shuffled"},
    "memory_plus stand-in": {"family": "memory_plus", "base": "w32", **SMALL, "control": "dense"},
    "ultramem_v2": {"family": "ultramem_v2", "base": "w32", **SMALL},
    "ngram_embedding": {"family": "ngram_embedding", "base": "w32", "table_rows": 41, "order_tables": 2},
    "token_table stem": {"family": "token_table", "base": "w32"},
    "token_table tails": {"family": "token_table", "base": "w32", "form": "per_layer_embedding"},
    "token_table values": {"family": "token_table", "base": "w32", "form": "value_embedding"},
    "engram": {"family": "engram", "base": "w32", "head_rows": 40, "hash_heads": 2, "zero_kernel": False},
    "engram_moe": {"family": "engram_moe", "base": "w32", "head_rows": 40, "hash_heads": 2, "zero_kernel": False},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    data = {"kind": "bios", "people": 20, "questions": 0.5}
    cell = {"model": FAMILIES["dense"], "data": data, "train": {"batch_rows": 1, "epochs": 1.0, "lr": 1.0}}
    return prepare(Cell.model_validate(cell).data, tmp_path_factory.mktemp("cache"))


def built(name: str, vocab: int = 50) -> Transformer:
    """Build a model whose buffers (batch norm statistics, expert biases) differ from their initial values."""
    options = FAMILIES[name]
    model = models.build(registry.family(options["family"]).config.model_validate(options), vocab, 0)
    with torch.no_grad():
        model.train()(tokens(vocab))
    model.after_step()
    return model.eval()


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def tokens(vocab: int = 50) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_transformers_loads_every_family_with_our_logits(name: str, tmp_path: Path) -> None:
    model = built(name)
    export(model, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    assert type(theirs).__name__ == ("LlamaForCausalLM" if "dense" in name else "NextParameterForCausalLM")
    with torch.no_grad():
        expected, logits = model(tokens()), theirs(tokens()).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        mask = torch.ones(2, 21, dtype=torch.int64)
        mask[1, :4] = 0
        padded = theirs(tokens(), attention_mask=mask).logits
        ours = model(tokens(), pad_B=torch.tensor([0, 4]))
    torch.testing.assert_close(padded[1, 4:], ours[1, 4:], rtol=0, atol=2e-5)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())


def test_all_files_of_an_export_have_the_permissions_of_a_new_file(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "new").touch()
    files = export(built("dense", corpus.vocab_size), tmp_path / "out", corpus)
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize(
    ("name", "form", "share"),
    [("pkm shuffled", "int8", None), ("ultramem_v2", "fp8", None), ("peer", None, None), ("pkm", "int4", 0.5)],
)
def test_exports_carry_smaller_tables_and_may_leave_tables_elsewhere(
    name: str, form: str | None, share: float | None, tmp_path: Path
) -> None:
    model = built(name)
    if form is not None:
        kept = [torch.arange(round(share * len(table.weight))) for table in model.memory_tables()] if share else None
        reduce_tables(model, form, kept)
    export(model, tmp_path / "out", quantised=form, kept_rows=share)
    theirs = loaded(tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens())
        torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=0, atol=1e-5)
        for source in ("file", "host"):
            theirs.place_tables(tmp_path / "out", source)
            assert not [key for key in theirs.state_dict() if key.endswith((".codes", "tables.0.weight"))]
            torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=0, atol=1e-5)


def test_exports_prefetch_rows_that_follow_from_ids(tmp_path: Path) -> None:
    model, theirs = exported("hashed_ngram", tmp_path / "out")
    prompts = tokens()[:, :6]
    expected = theirs.generate(prompts, max_new_tokens=4, do_sample=False, pad_token_id=0)
    theirs.place_tables(tmp_path / "out", "file", prefetch=True)
    (prefetcher,) = theirs.model.before_layers
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), rtol=0, atol=1e-5)
    assert theirs.generate(prompts, max_new_tokens=4, do_sample=False, pad_token_id=0).equal(expected)
    counted = [table.stored.store.traffic for table in theirs.model.memory_tables()]
    assert len(counted) == len(prefetcher.layers) == 2
    assert all(read.prefetched == read.rows > 0 for read in counted)


def exported(name: str, folder: Path) -> tuple[Transformer, Any]:
    """Return a model and its export, loaded by transformers; `hashed_ngram` is the baseline of the documentation."""
    if name == "hashed_ngram":
        loading.load(ROOT / "docs" / "hashed_ngram.py")
        model = models.build(registry.family(name).config(family=name, base="w32"), 50, 0).eval()
    else:
        model = built(name)
    export(model, folder)
    return model, loaded(folder)


@pytest.mark.parametrize("name", [*FAMILIES, "hashed_ngram"])
def test_greedy_generation_equals_ours_with_and_without_a_cache(name: str, tmp_path: Path) -> None:
    from suite.inference.generation import generate

    model, theirs = exported(name, tmp_path / "out")
    prompts = tokens()[:, :6]
    ours = generate(model, prompts.tolist(), 8)
    for use_cache in (True, False):
        generated = theirs.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=use_cache)
        assert generated[:, 6:].tolist() == ours, use_cache
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :3] = 0
    padded = theirs.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert padded[1, 6:].tolist() == generate(model, [prompts[1, 3:].tolist()], 8)[0]


@pytest.mark.parametrize("name", [name for name in POINTS if name != "squared"])
def test_modules_at_every_point_work_with_padding_and_a_cache(name: str, tmp_path: Path) -> None:
    loading.load(file_of(name, tmp_path))
    model = models.build(registry.family(name).config(family=name, base="w32"), 50, 0).eval()
    export(model, tmp_path / "out")
    theirs, mask = loaded(tmp_path / "out"), torch.ones(2, 21, dtype=torch.int64)
    mask[1, :4] = 0
    cache = transformers.DynamicCache(config=theirs.config)
    with torch.no_grad():
        ours = model(tokens(), pad_B=torch.tensor([0, 4]))
        parts = [
            theirs(part, attention_mask=mask[:, :end], past_key_values=cache).logits
            for part, end in zip(tokens().split([9, 1, 11], 1), (9, 10, 21), strict=True)
        ]
        for logits in (theirs(tokens(), attention_mask=mask).logits, torch.cat(parts, 1)):
            torch.testing.assert_close(logits[0], ours[0], rtol=0, atol=2e-5)
            torch.testing.assert_close(logits[1, 4:], ours[1, 4:], rtol=0, atol=2e-5)
        expected = theirs(torch.cat((tokens(), tokens()[:, :1]), 1)[[1]]).logits[:, -1]
        cache = transformers.DynamicCache(config=theirs.config)
        theirs(tokens(), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(theirs(tokens()[[1, 0], :1], past_key_values=cache).logits[:1, -1], expected)


@pytest.mark.parametrize("name", ["memory_plus", "hashed_ngram", "engram"])
def test_a_transformers_cache_can_be_filled_reordered_and_continued(name: str, tmp_path: Path) -> None:
    model, theirs = exported(name, tmp_path / "out")
    cache = transformers.DynamicCache(config=theirs.config)
    with torch.no_grad():
        whole = model(tokens())
        first = theirs(tokens()[:, :5], past_key_values=cache)
        assert first.past_key_values is cache
        assert cache.get_seq_length() == 5
        rest = theirs(tokens()[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((first.logits, rest), 1), whole, rtol=0, atol=1e-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        new = torch.tensor([[3], [4]])
        expected = model(torch.cat((tokens().flip(0), new), 1))[:, -1]
        torch.testing.assert_close(theirs(new, past_key_values=cache).logits[:, -1], expected, rtol=0, atol=1e-5)
    beams = [
        theirs.generate(
            tokens()[:, :6], max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, use_cache=use_cache
        ).tolist()
        for use_cache in (True, False)
    ]
    assert beams[0] == beams[1]
    with pytest.raises(ValueError, match=r"(past_key_values|cache): got a StaticCache, allowed: a DynamicCache"):
        theirs(new, past_key_values=transformers.StaticCache(config=theirs.config, max_cache_len=8))


def test_an_export_loads_without_this_package(tmp_path: Path) -> None:
    model = built("memory_plus")
    export(model, tmp_path / "out")
    script = """
import sys
sys.modules.update(suite=None, kernels=None)  # importing them is an error
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True).eval()
tokens_BT = torch.tensor(eval(sys.argv[1]))
print(model(tokens_BT).logits.tolist())
model.train()(tokens_BT, labels=tokens_BT).loss.backward()
"""
    command = [sys.executable, "-c", script, str(tokens().tolist())]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model(tokens()), rtol=0, atol=1e-5)


def test_an_external_baseline_is_exported_with_its_file(tmp_path: Path) -> None:
    loading.load(ROOT / "docs" / "hashed_ngram.py")
    config = registry.family("hashed_ngram").config(family="hashed_ngram", base="w32")
    model = models.build(config, 50, 0).eval()
    export(model, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(tokens()).logits, model(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "dense tied, grouped"])
def test_an_exported_llama_checkpoint_imports_unchanged(name: str, tmp_path: Path) -> None:
    model = built(name)
    export(model, tmp_path / "out")
    back = import_llama(tmp_path / "out")
    assert back.config.tie_embeddings == model.config.tie_embeddings
    for (name_in_model, before), (_, after) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(before, after), name_in_model


def test_a_sharded_llama_checkpoint_is_imported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    ours = import_llama(tmp_path / "llama")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(40)), theirs(tokens(40)).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-6),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("model_type", "x"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ],
)
def test_unsupported_llama_settings_are_refused_by_field(field: str, value: object, tmp_path: Path) -> None:
    export(built("dense"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf"config\.json: {field}: got"):
        import_llama(tmp_path / "out")


def test_a_llama_checkpoint_with_missing_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"away: config\.json: missing"):
        import_llama(str(tmp_path / "away"))
    export(built("dense"), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"out: model\.safetensors: missing"):
        import_llama(tmp_path / "out")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"out: one\.safetensors: missing"):
        import_llama(tmp_path / "out")


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "existing").write_text("")
    with pytest.raises(UserError, match="allowed: a new or empty folder"):
        export(built("dense"), tmp_path)


@pytest.mark.parametrize(("folder", "words"), [("existing", "which is a file"), ("existing/below", "Not a directory")])
def test_an_invalid_folder_is_refused(folder: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "existing").write_text("as before")
    with pytest.raises(UserError, match=rf"--to: got .*{folder}.*{words}, allowed: a new or empty folder"):
        export(built("dense"), tmp_path / folder)
    assert (tmp_path / "existing").read_text() == "as before"


@pytest.mark.parametrize("kind", [{"kind": "word"}, {"kind": "bytes"}, {"kind": "bpe", "vocab_size": 400}])
def test_tokenizers_give_the_same_ids_in_transformers(kind: dict[str, Any], corpus: Corpus, tmp_path: Path) -> None:
    data = corpus.config.model_copy(update={"tokenizer": TokenizerConfig.model_validate(kind)})
    tokenizer = prepare(data, tmp_path / "cache").tokenizer
    texts = [probe.prompt + probe.answer for probe in corpus.world.probes("storage", range(5))]
    made = fast_tokenizer(tokenizer)
    for text in texts:
        assert made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_an_unknown_word_is_refused_by_both_tokenizers(corpus: Corpus) -> None:
    assert corpus.tokenizer.kind == "word"
    with pytest.raises(UserError, match="'unheard-of'"):
        corpus.tokenizer.encode("unheard-of")
    with pytest.raises(Exception, match="WordLevel error"):
        fast_tokenizer(corpus.tokenizer).encode("unheard-of")


def test_lm_eval_gives_an_export_the_scores_of_the_model(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface")
    from suite.evaluate import catalog, harness
    from suite.evaluate.datasets import DataRoot

    tasks = EvalConfig(tasks=("bios_choice", "bios_storage"), limit=12)
    model = built("memory_plus", corpus.vocab_size)
    export(model, tmp_path / "out", corpus, corpus.config.seq_len)
    lm = lm_eval_model(tmp_path / "out")
    prepared = harness.prepare(tasks, catalog.Sources(corpus, DataRoot(None), None))
    theirs, ours = harness.scores_of(lm, prepared), harness.evaluate(model, corpus, tasks)["tasks"]
    for task, scores in ours.items():
        for metric, score in scores["metrics"].items():
            assert theirs[task]["metrics"][metric]["value"] == pytest.approx(score["value"], abs=1e-4), (task, metric)


def test_suite_export_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = {"model": FAMILIES["dense"], "data": {"kind": "bios", "people": 20}, "train": {"batch_rows": 2, "epochs": 0.2, "lr": 1e-3}}  # fmt: skip # noqa: E501
    Path("cell.json").write_text(json.dumps(cell))
    trained = CliRunner().invoke(app, ["train", "cell.json", "--json"])
    assert trained.exit_code == 0, trained.output
    run = next(Path("results/runs").iterdir()).name
    done = CliRunner().invoke(app, ["export", run, "--to", "out", "--json"])
    assert done.exit_code == 0, done.output
    assert {Path(file).name for file in json.loads(done.stdout)["files"]} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer("").input_ids == [0]
    shutil.rmtree("out")


def test_damaged_checkpoints_are_neither_exported_nor_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = {"batch_rows": 2, "epochs": 0.4, "lr": 1e-3, "checkpoint_every": 1}
    data = {"kind": "bios", "people": 20, "questions": 0.5}
    cell = {"model": FAMILIES["dense"], "data": data, "train": train}
    Path("cell.json").write_text(json.dumps(cell))
    assert CliRunner().invoke(app, ["train", "cell.json"]).exit_code == 0
    (run,) = Path("results/runs").iterdir()
    before, last = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    whole = (last / "state.pt").read_bytes()
    uses = (["export", run.name, "--to", "out"], ["eval", run.name, "--tasks", "bios_choice", "--limit", "2"])
    flip_a_byte(last / "state.pt")
    for command in uses:  # older weights would pass for those of the run
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, UserError), refused.output
        assert f"the last step, {last.name.removeprefix('step-')}, is damaged" in str(refused.exception)
        assert f"runs/{run.name}/cell.json trains from {before.name.replace('-', ' ')}" in str(refused.exception)
    assert not Path("out").exists()
    assert not list((run / "eval").glob("*.json"))
    for damage in (flip_a_byte, Path.unlink):
        damage(last / "state.pt")
        assert CliRunner().invoke(app, ["train", str(run / "cell.json")]).exit_code == 0
        saved, expected = (torch.load(file, weights_only=True) for file in (last / "state.pt", io.BytesIO(whole)))
        assert all(torch.equal(tensor, saved["model"][name]) for name, tensor in expected["model"].items())
    for command in uses:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    for path in (before, last):
        flip_a_byte(path / "state.pt")
    shutil.rmtree("out")
    for command in uses[0], [*uses[1][:3], "bios_storage"]:
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, UserError), refused.output
        assert before.name in str(refused.exception)
    assert not Path("out").exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_export_for_which_there_is_no_space_leaves_nothing(tmp_path: Path, corpus: Corpus) -> None:
    model = built("dense", corpus.vocab_size)
    with small_disk(), pytest.raises(UserError, match=r"exported/model\.safetensors: cannot be written: .* large"):
        export(model, tmp_path / "exported", corpus)
    assert list((tmp_path / "exported").iterdir()) == []
    assert len(export(model, tmp_path / "exported", corpus)) == 4
