"""Scores by lm-eval equal the probes and plain loops and are reproducible; invalid input is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from naive_scoring import naive_score, small_model

from suite import models
from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.data.sources.bios import BiosData
from suite.errors import UserError
from suite.evaluate import catalog
from suite.evaluate.datasets import DataRoot
from suite.evaluate.harness import Evaluator, Harness, evaluate, prepare
from suite.models.product_key import MemoryConfig
from suite.models.transformer import Transformer
from suite.train.probe import Prober


def test_probes_during_training_and_the_harness_agree(bios: Corpus, bios_model: Transformer) -> None:
    probes = Prober(bios, people=30).run(bios_model)["probe"]
    scores = evaluate(bios_model, bios, EvalConfig(tasks=tuple(f"bios_{kind}" for kind in probes)))
    for kind, values in probes.items():
        task = scores["tasks"][f"bios_{kind}"]
        assert task["n"] == values.pop("n")
        for metric, value in values.items():
            assert task["metrics"][metric]["value"] == pytest.approx(value, rel=1e-6)


def test_every_score_records_its_versions_prompts_and_data(bios: Corpus, bios_model: Transformer) -> None:
    config = EvalConfig(tasks=("bios_storage", "bios_qa", "bios_choice"), limit=7)
    scores = evaluate(bios_model, bios, config)
    assert scores["hash"] == config.hash8
    tasks = ["bios_storage", "bios_qa", "bios_choice"]
    assert scores["eval"] == {"tasks": tasks, "num_fewshot": None, "limit": 7, "table_off": False, "precision": "fp32"}
    assert scores["versions"]["lm-eval"].startswith("0.4.")
    for task in scores["tasks"].values():
        assert task["n"] == 7
        assert task["data_fingerprint"] == bios.fingerprint
        assert len(task["prompt_hash"]) == 16
        assert (task["version"], task["few_shot"], task["limit"], task["cut"]) == (1.0, 0, 7, 0)
    assert set(scores["tasks"]["bios_qa"]["metrics"]) == {"em", "f1"}
    assert set(scores["tasks"]["bios_choice"]["metrics"]["acc"]) == {"value", "stderr"}
    json.dumps(scores, allow_nan=False)


def test_answers_that_are_right_or_wrong_are_recorded_per_question(bios: Corpus, bios_model: Transformer) -> None:
    config = EvalConfig(tasks=("bios_storage", "bios_qa", "bios_choice"), limit=9)
    tasks = evaluate(bios_model, bios, config)["tasks"]
    answers = {name: task["answers"] for name, task in tasks.items()}
    assert answers["bios_storage"] == {}
    assert set(answers["bios_qa"]) >= {"em"}
    assert set(answers["bios_choice"]) >= {"acc"}
    for name, metrics in answers.items():
        for metric, text in metrics.items():
            assert len(text) == 9
            assert text.count("1") / 9 == pytest.approx(tasks[name]["metrics"][metric]["value"])
    few = evaluate(bios_model, bios, EvalConfig(tasks=("bios_choice",), limit=4))["tasks"]["bios_choice"]
    assert few["answers"]["acc"] == answers["bios_choice"]["acc"][:4]


def test_one_evaluator_gives_many_models_the_scores_of_new_evaluators(bios: Corpus, bios_model: Transformer) -> None:
    config = EvalConfig(tasks=("bios_storage", "bios_qa"), limit=20)
    evaluator = Evaluator()
    other = small_model(bios, seed=5)
    scores = [evaluator.evaluate(model, bios, config) for model in (other, bios_model, other)]
    assert scores == [evaluate(model, bios, config) for model in (other, bios_model, other)]
    assert scores[0] != scores[1]


def test_progress_is_the_share_of_the_requests_of_both_models(bios: Corpus, bios_model: Transformer) -> None:
    config = EvalConfig(tasks=("bios_storage", "bios_qa"), limit=3)
    shares: list[float] = []
    Evaluator().evaluate(bios_model, bios, config, small_model(bios, seed=5), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert 0.5 in shares


def test_scores_with_tables_off_are_those_of_zero_rows_under_a_hash_of_their_own(bios: Corpus) -> None:
    config = MemoryConfig(family="pkm", base="w32", half_keys=16, top_k=4)
    model = models.build(config, bios.vocab_size, seed=0).eval()
    on, off = (EvalConfig(tasks=("bios_storage",), limit=5, table_off=value) for value in (False, True))
    assert on.hash8 == EvalConfig(tasks=("bios_storage",), limit=5).hash8 != off.hash8
    with_table, without = (evaluate(model, bios, kind)["tasks"]["bios_storage"] for kind in (on, off))
    assert with_table["metrics"] == evaluate(model, bios, on)["tasks"]["bios_storage"]["metrics"]
    model.memory_tables()[0].weight.data.zero_()
    zero = evaluate(model, bios, on)["tasks"]["bios_storage"]
    assert zero["metrics"]["nll"]["value"] == pytest.approx(without["metrics"]["nll"]["value"], rel=1e-6)
    assert with_table["metrics"]["nll"]["value"] != pytest.approx(without["metrics"]["nll"]["value"], rel=1e-6)
    assert with_table["prompt_hash"] == without["prompt_hash"]


def test_scores_in_bf16_are_those_of_rounded_products_under_a_hash_of_their_own(
    bios: Corpus, bios_model: Transformer
) -> None:
    fp32, bf16, tf32 = (
        EvalConfig(tasks=("bios_storage",), limit=5, precision=kind) for kind in ("fp32", "bf16", "tf32")
    )
    assert fp32.hash8 == EvalConfig(tasks=("bios_storage",), limit=5).hash8
    assert len({fp32.hash8, bf16.hash8, tf32.hash8}) == 3
    before = torch.get_float32_matmul_precision()
    exact, rounded = (evaluate(bios_model, bios, kind)["tasks"]["bios_storage"]["metrics"] for kind in (fp32, bf16))
    difference = abs(exact["nll"]["value"] - rounded["nll"]["value"])
    assert 0 < difference < 0.02 * exact["nll"]["value"]
    with pytest.raises(UserError, match=r"evaluate.precision: got tf32"):
        evaluate(bios_model, bios, tf32)
    assert torch.get_float32_matmul_precision() == before


def test_bits_per_byte_of_held_out_text_equal_a_loop(text: Corpus, text_model: Transformer) -> None:
    task = evaluate(text_model, text, EvalConfig(tasks=("held_out",)))["tasks"]["held_out"]
    eot, encode = text.tokenizer.eot_id, text.tokenizer.encode
    length = text.config.seq_len
    nats = 0.0
    for document in text.held_out:
        ids = encode(document)
        # the first window has no context; the rest is scored after as much context as fits
        first, rest = ids[:length], ids[length:]
        nats -= naive_score(text_model, [eot], first)[0]
        if rest:
            context = ids[len(ids) - length - 1 : length]
            nats -= naive_score(text_model, context, rest)[0]
    size = sum(len(document.encode()) for document in text.held_out)
    assert task["metrics"]["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert task["metrics"]["bits_per_byte"]["stderr"] > 0
    assert task["n"] == len(text.held_out)


def test_stock_nq_open_runs_on_local_data(real_data: Path, text: Corpus, text_model: Transformer) -> None:
    config = EvalConfig(tasks=("nq_open", "nq_open_qa", "nq_open_nll"), num_fewshot=2, limit=5)
    tasks = evaluate(text_model, text, config, real_data)["tasks"]
    assert tasks["nq_open"]["version"] == 4.0
    assert tasks["nq_open"]["data_fingerprint"].startswith("sha256:")
    assert set(tasks["nq_open"]["metrics"]) == {"exact_match"}
    assert set(tasks["nq_open_qa"]["metrics"]) == {"em", "f1"}
    assert set(tasks["nq_open_nll"]["metrics"]) == {"nll", "nll_min", "bits_per_byte", "greedy"}
    # rows of 48 bytes cannot hold two examples
    assert tasks["nq_open"]["cut"] == 5
    assert tasks["nq_open_nll"]["metrics"]["nll"]["value"] >= tasks["nq_open_nll"]["metrics"]["nll_min"]["value"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nq", "evaluate.tasks: got 'nq', allowed: .*nq_open"),
        ("held_out", "task held_out: data.kind: got 'bios', allowed: a kind of text"),
        ("nq_open", "no google-research-datasets/nq_open/.*validation.jsonl .*suite data prefetch"),
    ],
)
def test_unsuitable_tasks_are_named(task: str, message: str, bios: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Harness(bios, EvalConfig(tasks=(task,)), tmp_path)


def test_bios_tasks_need_a_bios_corpus(text: Corpus) -> None:
    with pytest.raises(UserError, match=r"task bios_storage: data.kind: got 'text', allowed: 'bios'"):
        Harness(text, EvalConfig(tasks=("bios_storage",)))


@pytest.mark.parametrize(
    ("task", "questions", "message"),
    [
        ("bios_qa", 0.0, "task bios_qa: data.questions: got 0.0, allowed: a share"),
        ("held_out", 0.5, "task held_out: data.kind: got 'bios', allowed: a kind of text"),
        ("mbpp", 0.5, "task mbpp: runs programs"),
        ("nq", 0.5, "evaluate.tasks: got 'nq'"),
    ],
)
def test_unsuitable_tasks_are_refused_before_training(task: str, questions: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalog.refuse_unfit(["bios_storage", task], BiosData(kind="bios", people=10, questions=questions))


def test_a_tokenizer_without_the_stop_is_named(bios: Corpus, bios_model: Transformer, real_data: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        evaluate(bios_model, bios, EvalConfig(tasks=("nq_open",), limit=2), real_data)


def test_more_examples_than_the_data_has_are_refused(real_data: Path, bios: Corpus) -> None:
    sources = catalog.Sources(bios, DataRoot(real_data))
    questions = len(catalog.load(["bios_choice"], sources).tasks["bios_choice"].eval_docs)
    of_one_person = 6
    for task, most in (("mmlu", 5), ("hellaswag", 49), ("bios_choice", questions - of_one_person)):
        prepare(EvalConfig(tasks=(task,), num_fewshot=most, limit=1), sources)
        catalog.refuse_too_many_examples(EvalConfig(tasks=(task,), num_fewshot=most), bios.config, real_data)
        more = EvalConfig(tasks=(task,), num_fewshot=most + 1, limit=1)
        with pytest.raises(UserError, match=rf"num_fewshot: got {most + 1}, allowed: at most {most}"):
            prepare(more, sources)
        with pytest.raises(UserError, match=rf"num_fewshot: got {most + 1}, allowed: at most {most}"):
            catalog.refuse_too_many_examples(more, bios.config, real_data)


@pytest.mark.parametrize("task", ["bios_qa", "bios_choice"])
def test_a_diverged_model_is_not_scored(task: str, bios: Corpus) -> None:
    model = small_model(bios)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluate(model, bios, EvalConfig(tasks=(task,), limit=2))


def test_examples_of_a_world_are_in_its_words_and_not_the_question(bios: Corpus, bios_model: Transformer) -> None:
    config = EvalConfig(tasks=("bios_qa", "bios_choice"), num_fewshot=30)
    scores = evaluate(bios_model, bios, config)
    assert {task["few_shot"] for task in scores["tasks"].values()} == {30}
    for task in prepare(config, catalog.Sources(bios, DataRoot(None))).loaded.tasks.values():
        # a question is not its own example
        assert all(request.args[0].count(request.doc["prompt"]) == 1 for request in task.instances)


def test_importing_probes_needs_no_evaluation_library() -> None:
    import subprocess
    import sys

    code = "import sys, suite.train.probe; assert not {'lm_eval', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluation_leaves_no_gradients(bios: Corpus, bios_model: Transformer) -> None:
    evaluate(bios_model, bios, EvalConfig(tasks=("bios_choice",), limit=3))
    assert all(parameter.grad is None for parameter in bios_model.parameters())
    assert torch.is_grad_enabled()


def test_prompts_equal_those_of_unpatched_lm_eval(real_data: Path) -> None:
    config = EvalConfig(tasks=("nq_open", "triviaqa_qa", "hellaswag", "openbookqa", "mmlu"), num_fewshot=3, limit=3)
    sources = catalog.Sources(None, DataRoot(real_data))
    ours = prepare(config, sources).loaded.tasks
    plain = catalog.load(config.tasks, sources, config.num_fewshot).tasks
    for name, task in plain.items():
        task.build_all_requests(limit=3)
        assert [request.args for request in ours[name].instances] == [request.args for request in task.instances]


def test_whole_documents_are_scored_and_recorded_without_examples(text: Corpus, text_model: Transformer) -> None:
    plain, with_examples = (
        evaluate(text_model, text, EvalConfig(tasks=("held_out",), num_fewshot=shots))["tasks"]["held_out"]
        for shots in (None, 3)
    )
    assert with_examples["few_shot"] == 0
    assert plain == with_examples


def test_a_single_document_has_no_standard_error(text: Corpus, text_model: Transformer) -> None:
    task = evaluate(text_model, text, EvalConfig(tasks=("held_out",), limit=1))["tasks"]["held_out"]
    assert task["metrics"]["bits_per_byte"]["value"] > 0
    assert task["metrics"]["bits_per_byte"]["stderr"] is None


@pytest.mark.parametrize("task", ["bios_storage", "bios_paraphrase", "bios_extraction", "bios_qa", "bios_choice"])
def test_examples_are_about_other_people(task: str, bios: Corpus) -> None:
    loaded = prepare(EvalConfig(tasks=(task,), num_fewshot=5), catalog.Sources(bios, DataRoot(None))).loaded
    for request in loaded.tasks[task].instances:
        name = bios.world.name(request.doc["person"])
        assert request.args[0].count(name) == 1, "the question alone names the person"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_never_scored(value: float, bios: Corpus) -> None:
    model = small_model(bios)
    unused = bios.vocab_size - 1
    with torch.no_grad():
        model.embedding.weight[unused, 0] = value
    with pytest.raises(UserError, match=r"embedding\.weight") as raised:
        evaluate(model, bios, EvalConfig(tasks=("bios_qa",), limit=2))
    assert "\n" not in str(raised.value)


def test_long_held_out_documents_are_truncated(tmp_path: Path) -> None:
    from suite.data.corpus import prepare as prepare_corpus
    from suite.data.sources.text_files import TextData
    from suite.data.tokenizer_config import TokenizerConfig
    from suite.evaluate.corpus_docs import MAX_CHARACTERS, documents

    novel = "some words " * 10_000
    (tmp_path / "a.txt").write_text("short text")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", novel)))
    config = TextData(
        kind="text",
        path=str(tmp_path / "a.txt"),
        validation=str(tmp_path / "b.jsonl"),
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    short, long = (doc["text"] for doc in documents(prepare_corpus(config, tmp_path / "cache"), "held_out", "held_out"))
    assert short == "short"
    assert novel.startswith(f"{long} ")
    assert MAX_CHARACTERS - 10 < len(long) <= MAX_CHARACTERS
