"""Reading evaluation data: always from the current files, with one-line errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import unprivileged

from suite.cells import EvalConfig
from suite.errors import UserError
from suite.evaluate import catalog, oracle, presets, task_list
from suite.evaluate.datasets import DataRoot, Docs
from suite.evaluate.prefetch import prefetch

NQ = "google-research-datasets/nq_open"


def write(root: Path, rows: list[Any], split: str = "validation") -> Path:
    path = root / NQ / "nq_open" / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rewritten_files_are_read_again(tmp_path: Path) -> None:
    data = DataRoot(tmp_path)
    fingerprints = set()
    for answer in ("one", "two"):
        write(tmp_path, [{"question": "which", "answer": [answer]}])
        assert data.load(NQ, None, ["validation"])["validation"][0]["answer"] == [answer]
        fingerprints.add(data.fingerprint(NQ, None, ["validation"]))
    assert len(fingerprints) == 2


def test_parquet_shards_equal_jsonl(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": [str(n)]} for n in range(5)]
    write(tmp_path, rows, "train")
    for shard, part in enumerate((rows[:3], rows[3:])):
        path = tmp_path / NQ / "nq_open" / f"validation-0000{shard}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
    loaded = DataRoot(tmp_path).load(NQ, None, ["train", "validation"])
    assert loaded["train"] == loaded["validation"] == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"nq_open/validation.jsonl: row 2: no field answer"),
        ({"question": "q", "answer": []}, r"row 2: answer: got \[\]"),
        ({"question": "q", "answer": [""]}, r"row 2: answer\[0\]: got ''"),
        ({"question": "q", "answer": [1988]}, r"row 2: answer\[0\]: got 1988"),
        ({"question": "q", "answer": "Paris"}, r"row 2: answer: got 'Paris'"),
        ({"question": None, "answer": ["a"]}, r"row 2: question: got None"),
        ("not an object", r"validation.jsonl:2: got str"),
    ],
)
def test_invalid_rows_are_named(row: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, [{"question": "q", "answer": ["a"]}, row])
    with pytest.raises(UserError, match=message) as raised:
        oracle.run(["nq_open"], tmp_path)
    assert "\n" not in str(raised.value)


def test_answers_that_are_years_are_text(tmp_path: Path) -> None:
    write(tmp_path, [{"question": "when", "answer": ["1988"]}])
    report = oracle.run(["nq_open", "nq_open_qa", "nq_open_nll"], tmp_path)
    assert all(m["oracle"] == 1.0 for task in report["tasks"].values() for m in task["metrics"].values())


def test_an_incomplete_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}] * 2)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(
        UserError, match=r"validation.jsonl:2: not JSON .*if the file is incomplete, copy or download it again"
    ):
        oracle.run(["nq_open"], tmp_path)
    path.write_text("")
    with pytest.raises(UserError, match=r"validation.jsonl: got no rows"):
        oracle.run(["nq_open"], tmp_path)


def test_an_integer_of_many_digits_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}])
    path.write_text(path.read_text() + '{"question": "q", "answer": ' + "7" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"validation.jsonl:2: not JSON \(Exceeds the limit \(4300 digits\)"):
        oracle.run(["nq_open"], tmp_path)


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    folder = tmp_path / NQ / "nq_open"
    folder.mkdir(parents=True)
    (folder / "validation.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"validation.parquet: not whole parquet"):
        DataRoot(tmp_path).load(NQ, None, ["validation"])


def test_missing_files_of_few_shot_examples_are_named_before_training(tmp_path: Path) -> None:
    write(tmp_path, [{"question": "q", "answer": ["a"]}])
    catalog.refuse_missing(EvalConfig(tasks=("bios_storage", "nq_open_qa")), tmp_path)
    with pytest.raises(UserError, match=r"no google-research-datasets/nq_open/nq_open/train.jsonl"):
        catalog.refuse_missing(EvalConfig(tasks=("nq_open_qa",), num_fewshot=1), tmp_path)


def test_a_split_that_exists_twice_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": ["a"]}]
    path = write(tmp_path, rows)
    data = DataRoot(tmp_path)
    for name in ("validation-old.jsonl", "validation_old.jsonl", ".validation.jsonl"):
        path.with_name(name).write_text(path.read_text())
    assert data.files(NQ, None, "validation") == [path], "only the exact name or numbered shards belong to the split"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    with pytest.raises(UserError, match=r"validation .*validation\.jsonl, validation\.parquet"):
        data.files(NQ, None, "validation")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nothing")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: is a folder, a pipe or a link to nothing"):
        DataRoot(tmp_path).split(NQ, None, "validation")


@unprivileged.needs_permissions
def test_a_file_of_another_user_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}])
    path.chmod(0)
    program = "import sys; from pathlib import Path; from suite.evaluate.datasets import DataRoot\ntry:"
    program += f"\n DataRoot(Path(sys.argv[1])).split({NQ!r}, None, 'validation')"
    program += "\nexcept Exception as error:\n print(type(error).__name__, error)"
    assert unprivileged.run(program, tmp_path).startswith(f"UserError {path}: cannot be read")


def test_a_missing_or_doubled_shard_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}])
    shards = [path.rename(path.with_name("validation-00000-of-00003.jsonl"))]
    for name in ("validation-00002-of-00003.jsonl", "validation-00001-of-00003-0a1b.jsonl"):
        if len(shards) == 2:
            with pytest.raises(UserError, match=r"validation: shard 1 of 3 is missing"):
                DataRoot(tmp_path).files(NQ, None, "validation")
        shards.append(path.with_name(name))
        shards[-1].write_text(shards[0].read_text())
    assert DataRoot(tmp_path).files(NQ, None, "validation") == sorted(shards)
    path.with_name("validation-00001-of-00003-ffff.jsonl").write_text("")
    with pytest.raises(UserError, match="more than once"):
        DataRoot(tmp_path).files(NQ, None, "validation")


def test_hidden_folders_are_not_configurations(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}])
    (path.parents[1] / ".ipynb_checkpoints").mkdir()
    assert DataRoot(tmp_path).files(NQ, None, "validation") == [path]


def test_half_of_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    write(tmp_path, [{"question": "q", "answer": ["a"]}, {"question": "\ud83d", "answer": ["a"]}])
    with pytest.raises(UserError, match=r"validation\.jsonl: row 2: question: got .*ud83d"):
        oracle.run(["nq_open"], tmp_path)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data-root: got .*nowhere"):
        DataRoot(tmp_path / "nowhere")


def test_no_request_is_sent_to_the_hub_when_offline() -> None:
    with pytest.raises(UserError, match=r"google-research-datasets/nq_open \(default, validation\): not from the hub"):
        DataRoot(None).load(NQ, None, ["validation"])


def test_a_data_set_that_only_a_script_can_load_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the library prefers a local folder to the hub
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/name.py").touch()
    with pytest.raises(UserError, match=r"org/name \(default, test\): not from the hub \(Dataset scripts") as raised:
        DataRoot(None).load("org/name", None, ["test"])
    assert "\n" not in str(raised.value)


def test_prefetch_writes_only_missing_files(tmp_path: Path) -> None:
    downloads = []

    def download(repo: str, config: str | None, split: str) -> Docs:
        downloads.append((repo, config, split))
        return Docs([{"question": "q", "answer": ["a"]}])

    written = prefetch(tmp_path, ["nq_open", "nq_open_qa"], download)
    assert sorted(downloads) == [(NQ, None, "train"), (NQ, None, "validation")]
    assert oracle.run(["nq_open_qa"], tmp_path)["tasks"]["nq_open_qa"]["n"] == 1
    assert len(written) == 2
    assert prefetch(tmp_path, ["nq_open"], download) == []


def test_prefetch_covers_every_file_that_tasks_read(tmp_path: Path) -> None:
    prefetch(tmp_path, None, lambda *_: Docs([{"any": "row"}]))
    names = task_list.names(corpus=False)
    assert catalog.without_data(names, tmp_path) == []
    for examples in (None, 2):
        catalog.refuse_missing(EvalConfig(tasks=tuple(names), num_fewshot=examples), tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl")}
    assert {
        "allenai/ai2_arc/ARC-Challenge/test.jsonl",
        "allenai/winogrande/winogrande_xl/train.jsonl",
        "EleutherAI/lambada_openai/default/test.jsonl",
        "google-research-datasets/mbpp/full/prompt.jsonl",
    } <= written
    # whole documents have no examples
    assert [path for path in written if "wikitext" in path] == [
        "EleutherAI/wikitext_document_level/wikitext-2-raw-v1/test.jsonl"
    ]


def test_the_layout_of_real_data_is_that_of_prefetch(real_data: Path) -> None:
    tasks, _ = oracle.every_task(real_data, run_code=True)
    assert {"nq_open", "mmlu", "mbpp", "hellaswag", "openbookqa"} <= set(tasks)
    assert prefetch(real_data, tasks) == []


def test_every_task_is_every_task_whose_files_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the data of no task; get it with: suite data prefetch"):
        oracle.every_task(tmp_path, run_code=True)
    path = write(tmp_path, [{"question": "q", "answer": ["a"]}])
    present, absent = oracle.every_task(tmp_path, run_code=False)
    assert present == ("nq_open", "nq_open_nll", "nq_open_qa"), "examples of other splits are not used"
    assert {*present, *absent} == set(task_list.names(corpus=False, run_code=False))
    path.rename(path.with_name("validation-00000-of-00002.jsonl"))
    assert oracle.every_task(tmp_path, run_code=False) == (present, absent)
    with pytest.raises(UserError, match="shard 1 of 2 is missing"):
        oracle.run(present, tmp_path)


def test_tasks_of_presets_exist() -> None:
    tasks = {task for configs in presets.PRESETS.values() for config in configs for task in config.tasks}
    assert tasks <= set(task_list.names())
    assert all(isinstance(config, EvalConfig) for config in presets.preset("quick"))
    with pytest.raises(UserError, match="--preset: got 'fast', allowed: paper, quick"):
        presets.preset("fast")
