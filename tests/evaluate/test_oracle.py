"""A model that knows every answer and one that is always wrong, over the real data and a world."""

from __future__ import annotations

import json
from pathlib import Path

import invented_rows
import pytest

from suite.data.corpus import Corpus
from suite.errors import UserError
from suite.evaluate import oracle, task_list
from suite.evaluate.datasets import DataRoot
from suite.evaluate.sandbox import Sandbox
from suite.evaluate.tasks import code

STOCK_STOPS = {"nq_open", "triviaqa"}
QUICK = [
    "nq_open",
    "nq_open_qa",
    "nq_open_nll",
    "triviaqa",
    "triviaqa_qa",
    "hotpotqa_qa",
    "hellaswag",
    "piqa",
    "openbookqa",
]


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except UserError as error:
        pytest.skip(str(error))


def check(report: dict) -> None:
    for name, task in report["tasks"].items():
        assert task["n"] > 0
        assert task["metrics"]
        for values in task["metrics"].values():
            assert values["wrong"] == 0.0, name
            assert values["oracle"] == values["ceiling"], name
            assert values["oracle"] == 1.0 or name in STOCK_STOPS


def test_real_tasks_reach_their_ceilings(real_data: Path) -> None:
    check(oracle.run(QUICK, real_data, limit=150))


@pytest.mark.slow
def test_every_real_task_reaches_its_ceiling(real_data: Path, sandbox: Sandbox) -> None:
    tasks, absent = oracle.every_task(real_data, run_code=True)
    report = oracle.run(tasks, real_data, sandbox=sandbox)
    check(report)
    assert set(absent) <= set(invented_rows.TASKS)
    assert len([name for name in report["tasks"] if name.startswith("mmlu_")]) == 57
    assert report["tasks"]["mmlu"]["n"] == 14_042
    # 0.896 of the canonical answers contain no stock stop string
    assert 0.89 < report["tasks"]["nq_open"]["metrics"]["exact_match"]["ceiling"] < 1.0


def test_tasks_about_a_bios_world_reach_their_ceilings(bios: Corpus) -> None:
    report = oracle.run(["bios_storage", "bios_paraphrase", "bios_extraction", "bios_qa", "bios_choice"], corpus=bios)
    check(report)


def test_canonical_programs_pass_and_others_do_not(real_data: Path, sandbox: Sandbox) -> None:
    check(oracle.run(["humaneval", "mbpp", "mbpp_10"], real_data, sandbox=sandbox, limit=8))


def test_programs_are_refused_without_a_sandbox(real_data: Path) -> None:
    with pytest.raises(UserError, match=r"task humaneval: .*--run-code"):
        oracle.run(["humaneval"], real_data)


def test_prompts_of_mbpp_are_stock(real_data: Path) -> None:
    """The stock examples, read from lm-eval's source: its module cannot be imported without the hub."""
    source = (task_list.STOCK / "mbpp/utils.py").read_text()
    namespace: dict = {}
    exec(source[source.index("def list_fewshot_samples") :], namespace)
    stock = namespace["list_fewshot_samples"]()
    mbpp = task_list.entry("mbpp")
    made = code.configure("mbpp", *mbpp.configs(), mbpp.programs, DataRoot(real_data), Sandbox("rlimits"))[
        "fewshot_config"
    ]["samples"]
    fields = ("text", "code", "test_list", "is_fewshot")
    assert [{f: doc[f] for f in fields} for doc in made] == [{f: doc[f] for f in fields} for doc in stock]


@pytest.mark.parametrize(("count", "passed", "k"), [(10, 3, 1), (10, 3, 4), (10, 0, 5), (10, 10, 10), (5, 2, 4)])
def test_pass_at_k_is_the_share_of_all_draws(count: int, passed: int, k: int) -> None:
    import itertools

    draws = list(itertools.combinations([True] * passed + [False] * (count - passed), k))
    assert code.pass_at(k, count, passed) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_the_report_is_json(real_data: Path) -> None:
    json.dumps(oracle.run(["nq_open_qa"], real_data, limit=3), allow_nan=False)
