"""ARC, Winogrande, Lambada and Wikitext: scores equal plain loops, and invalid rows are named."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from invented_rows import ARC, LAMBADA, SETS, TASKS, WIKITEXT, WINOGRANDE, write_rows
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import perplexity, weighted_perplexity
from naive_scoring import naive_score, small_model

from suite.cells import EvalConfig
from suite.data.corpus import Corpus, prepare
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.evaluate import catalog, harness, oracle
from suite.evaluate.datasets import DataRoot
from suite.evaluate.harness import evaluate, scores_of
from suite.evaluate.lm_eval_patches import closed_form_errors
from suite.models.transformer import Transformer


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Bytes, in rows that hold every prompt but not every page."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"Ada saw {n} of it."}) + "\n" for n in range(40)))
    config = TextData(
        kind="text",
        path=str(folder / "a.jsonl"),
        held_out=0.3,
        seq_len=160,
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    return prepare(config, folder / "cache")


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Transformer:
    return small_model(corpus)


def rows_of(repo: str) -> list[dict[str, Any]]:
    return next(rows for (name, _), (_, rows) in SETS.items() if name == repo)


def naive(model: Transformer, corpus: Corpus, context: str, continuation: str) -> tuple[float, bool]:
    encode = corpus.tokenizer.encode
    return naive_score(model, [corpus.tokenizer.eot_id, *encode(context)], encode(continuation))


def test_models_that_know_everything_or_nothing_reach_1_and_0(rows: Path) -> None:
    report = oracle.run(TASKS, rows)["tasks"]
    assert {name: set(task["metrics"]) for name, task in report.items()} == {
        "arc_easy": {"acc", "acc_norm"},
        "arc_challenge": {"acc", "acc_norm"},
        "winogrande": {"acc"},
        "lambada_openai": {"acc"},
        "wikitext": set(),
    }
    for task in report.values():
        assert task["n"] == 8
        assert all(metric == {"oracle": 1.0, "wrong": 0.0, "ceiling": 1.0} for metric in task["metrics"].values())


def test_winogrande_compares_the_rest_of_the_sentence_after_each_option(
    rows: Path, corpus: Corpus, model: Transformer
) -> None:
    task = evaluate(model, corpus, EvalConfig(tasks=("winogrande",)), rows)["tasks"]["winogrande"]
    expected = ""
    for row in rows_of(WINOGRANDE):
        before, after = row["sentence"].split("_")
        first, second = (naive(model, corpus, before + row[option], after)[0] for option in ("option1", "option2"))
        expected += str(int((second > first) == (row["answer"] == "2")))
    assert set(expected) == {"0", "1"}
    assert task["answers"] == {"acc": expected}
    assert task["metrics"]["acc"]["value"] == expected.count("1") / 8
    assert task["cut"] == 0


def test_arc_has_three_to_five_choices_and_letters_or_digits(rows: Path, corpus: Corpus, model: Transformer) -> None:
    task = evaluate(model, corpus, EvalConfig(tasks=("arc_easy",)), rows)["tasks"]["arc_easy"]
    expected = {"acc": "", "acc_norm": ""}
    for row in rows_of(ARC):
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        scores = [naive(model, corpus, f"Question: {row['question']}\nAnswer:", f" {text}")[0] for text in texts]
        per_letter = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        for metric, values in (("acc", scores), ("acc_norm", per_letter)):
            expected[metric] += str(int(labels[values.index(max(values))] == row["answerKey"]))
    assert task["answers"] == expected


def test_lambada_scores_the_last_word(rows: Path, corpus: Corpus, model: Transformer) -> None:
    results = [evaluate(model, corpus, EvalConfig(tasks=("lambada_openai",)), rows)["tasks"] for _ in range(2)]
    assert results[0] == results[1]
    task = results[0]["lambada_openai"]
    scores = [
        naive(model, corpus, *re.fullmatch(r"(.*)( \S+)", row["text"], re.S).groups()) for row in rows_of(LAMBADA)
    ]
    nats = [-log_p for log_p, _ in scores]
    value = math.exp(statistics.mean(nats))
    assert task["metrics"]["perplexity"]["value"] == pytest.approx(value, rel=1e-4)
    error = value * statistics.stdev(nats) / math.sqrt(8)
    assert task["metrics"]["perplexity"]["stderr"] == pytest.approx(error, rel=1e-4)
    assert task["answers"] == {"acc": "".join(str(int(greedy)) for _, greedy in scores)}


def test_wikitext_counts_words_and_bytes_of_the_page_as_it_is(rows: Path, corpus: Corpus, model: Transformer) -> None:
    task = evaluate(model, corpus, EvalConfig(tasks=("wikitext",), num_fewshot=2), rows)["tasks"]["wikitext"]
    prepared = harness.prepare(EvalConfig(tasks=("wikitext",)), catalog.Sources(None, DataRoot(rows)))
    texts = [request.args[0] for request in prepared.loaded.tasks["wikitext"].instances]
    assert texts[1] == '\n= The ladder =\n\nIt had 1,000 parts, and one "name".\nIt had 1,000 parts, and one "name".\n'
    eot, length = corpus.tokenizer.eot_id, corpus.config.seq_len
    assert any(len(text) > length for text in texts)
    nats = 0.0
    for text in texts:
        ids = corpus.tokenizer.encode(text)
        nats -= naive_score(model, [eot], ids[:length])[0]
        if ids[length:]:  # after as much context as fits
            nats -= naive_score(model, ids[len(ids) - length - 1 : length], ids[length:])[0]
    pages = [row["page"] for row in rows_of(WIKITEXT)]
    words, size = sum(1 + len(re.findall(r"\s+", page)) for page in pages), sum(len(page.encode()) for page in pages)
    expected = {
        "word_perplexity": math.exp(nats / words),
        "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }
    values = {metric: score["value"] for metric, score in task["metrics"].items()}
    assert values == pytest.approx(expected, rel=1e-4)
    assert all(score["stderr"] > 0 for score in task["metrics"].values())
    assert task["few_shot"] == 0


@pytest.mark.parametrize("aggregation", [perplexity, weighted_perplexity])
def test_errors_of_perplexities_are_those_of_a_bootstrap(aggregation: Any) -> None:
    from lm_eval import evaluator_utils

    draw = random.Random(0)
    items: list[Any] = [draw.gauss(-2, 0.7) for _ in range(300)]
    if aggregation is weighted_perplexity:
        items = [(item * words, words) for item in items for words in [draw.randint(5, 50)]]
    with closed_form_errors():
        error = evaluator_utils.stderr_for_metric(metric=aggregation, bootstrap_iters=1)(items)
    samples = [float(aggregation(draw.choices(items, k=len(items)))) for _ in range(1500)]
    assert error == pytest.approx(statistics.stdev(samples), rel=0.08)


def test_prompts_equal_those_of_unpatched_lm_eval(rows: Path) -> None:
    config, sources = EvalConfig(tasks=TASKS, num_fewshot=3), catalog.Sources(None, DataRoot(rows))
    ours = harness.prepare(config, sources).loaded.tasks
    for name, task in catalog.load(TASKS, sources, 3).tasks.items():
        task.build_all_requests()
        assert [request.args for request in ours[name].instances] == [request.args for request in task.instances]


def test_questions_are_not_their_own_examples(rows: Path) -> None:
    """Lambada has one split, of which stock lm-eval draws the question itself as well."""
    sources = catalog.Sources(None, DataRoot(rows))
    prepared = harness.prepare(EvalConfig(tasks=("lambada_openai", "winogrande"), num_fewshot=7), sources)
    for request in prepared.loaded.tasks["lambada_openai"].instances:
        assert request.args[0].count(request.doc["text"].split("\n")[0]) == 1
    for request in prepared.loaded.tasks["winogrande"].instances:
        assert request.args[0].count(request.doc["sentence"].split("_")[0]) == 1
    with pytest.raises(UserError, match=r"task lambada_openai: num_fewshot: got 8, allowed: at most 7"):
        harness.prepare(EvalConfig(tasks=("lambada_openai",), num_fewshot=8), sources)


@pytest.mark.parametrize("option", ["option1", "option2"])
def test_the_hash_of_the_prompts_covers_both_contexts(option: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path) / WINOGRANDE / "winogrande_xl/validation.jsonl"
    hashes = set()
    for value in ("barrel", "basket"):
        changed = [row | {option: value} for row in rows_of(WINOGRANDE)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        prepared = harness.prepare(EvalConfig(tasks=("winogrande",)), catalog.Sources(None, DataRoot(tmp_path)))
        hashes.add(prepared.prompt_hashes["winogrande"])
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("task", "file", "change", "message"),
    [
        ("arc_easy", f"{ARC}/ARC-Easy/test", {"answerKey": "E"}, "row 8: answerKey: got 'E', allowed: 1, 2, 3, 4"),
        (
            "arc_easy",
            f"{ARC}/ARC-Easy/test",
            {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "row 8: choices.label: got 1 labels, allowed: one for each of choices.text",
        ),
        ("arc_challenge", f"{ARC}/ARC-Challenge/test", {"choices": ["a"]}, "row 8: choices: got ['a']"),
        ("winogrande", f"{WINOGRANDE}/winogrande_xl/validation", {"answer": ""}, "row 8: answer: got ''"),
        (
            "winogrande",
            f"{WINOGRANDE}/winogrande_xl/validation",
            {"sentence": "No gap."},
            "row 8: sentence: got 'No gap",
        ),
        ("lambada_openai", f"{LAMBADA}/default/test", {"text": " "}, "row 8: text: got ' '"),
        ("wikitext", f"{WIKITEXT}/wikitext-2-raw-v1/test", {"page": None}, "row 8: page: got None"),
    ],
)
def test_invalid_rows_are_named(task: str, file: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path) / f"{file}.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | change)]))
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")) as raised:
        oracle.run([task], tmp_path)
    assert "\n" not in str(raised.value)


class Improbable(oracle.Knowing):
    """A model whose weights have grown without bound: finite, but e to the power of its loss is no number."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1e4, False) for _ in requests]


def test_a_perplexity_that_is_no_number_is_one_line(rows: Path) -> None:
    prepared = harness.prepare(EvalConfig(tasks=("lambada_openai",)), catalog.Sources(None, DataRoot(rows)))
    with pytest.raises(UserError, match="perplexity is above 1e308"):
        scores_of(Improbable(prepared.loaded.tasks, right=False), prepared)
