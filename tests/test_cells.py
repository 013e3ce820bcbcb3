"""Cells: frozen, strict, and identified by what makes their weights."""

from typing import Any

import pytest
from pydantic import ValidationError

import suite.models  # noqa: F401  (registers the families)
from suite.cells import Cell, EvalConfig, display_name, variants, with_current_names


def fields(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"family": "dense", "base": "w32"},
        "data": {"kind": "bios", "people": 50},
        "train": {"batch_rows": 4, "epochs": 2.0, "lr": 1e-3},
    }
    for path, value in changes.items():
        place = base
        *parents, last = path.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return base


def cell(**changes: Any) -> Cell:
    return Cell.model_validate(fields(**changes))


def test_a_field_set_to_its_default_does_not_change_the_hash() -> None:
    assert cell().hash8 == cell(seed=0, threads=1, train__weight_decay=0.1, data__world=0).hash8


def test_renaming_a_field_does_not_change_the_hash() -> None:
    """The hash is the one that `optimizer: dense` had before it became `table_optimizer`."""
    dense = memory(train__table_optimizer="dense")
    assert dense.hash8 == "dd3f5166"
    assert memory(train__table_optimizer="row_wise").hash8 == memory().hash8 != dense.hash8
    assert variants([memory(), memory(seed=1), dense])[dense.run_name] == {"train.table_optimizer": "dense"}


def test_a_record_with_the_old_name_of_a_field_is_read() -> None:
    dense = memory(train__table_optimizer="dense")
    record = dense.model_dump(mode="json")
    record["train"]["optimizer"] = record["train"].pop("table_optimizer")
    assert Cell.model_validate(with_current_names(record)) == dense
    assert with_current_names(dense.model_dump()) == dense.model_dump()


def test_the_old_name_of_a_field_is_refused_with_the_new_one() -> None:
    with pytest.raises(ValidationError, match=r"train\.optimizer: renamed to table_optimizer"):
        cell(train__optimizer="dense")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"threads": 2},
        {"train__lr": 2e-3},
        {"data__people": 51},
        {"model__base": "w64"},
        {"baseline": "ab"},
    ],
)
def test_every_setting_that_affects_weights_changes_the_hash(change: dict[str, Any]) -> None:
    assert cell(**change).hash8 != cell().hash8


def test_evaluations_paths_and_logging_do_not_change_the_hash() -> None:
    assert cell(evaluate=[{"tasks": ["bios_qa"]}]).hash8 == cell().hash8
    assert cell(train__log_every=1, train__checkpoint_every=7).hash8 == cell().hash8
    text = {"kind": "text", "fingerprint": "f" * 64}
    assert cell(data={**text, "path": "/a"}).hash8 == cell(data={**text, "path": "/b"}).hash8


def test_an_evaluation_has_its_own_hash() -> None:
    assert EvalConfig(tasks=("bios_qa",)).hash8 != EvalConfig(tasks=("bios_qa",), limit=3).hash8


def test_added_evaluations_skip_tasks_that_exist_with_the_same_settings() -> None:
    first = EvalConfig(tasks=("a", "b"), limit=3)
    extended = cell(evaluate=[first.model_dump()]).with_evaluations(
        (
            EvalConfig(tasks=("b",), limit=3),
            EvalConfig(tasks=("b",)),
            EvalConfig(tasks=("c", "a"), limit=3),
            EvalConfig(tasks=("a",), limit=3, num_fewshot=2),
            EvalConfig(tasks=("c", "b", "c")),
        )
    )
    assert extended.evaluate == (
        first,
        EvalConfig(tasks=("b",)),
        EvalConfig(tasks=("c",), limit=3),
        EvalConfig(tasks=("a",), limit=3, num_fewshot=2),
        EvalConfig(tasks=("c",)),
    )


def test_a_cell_is_unchanged_by_json() -> None:
    before = cell(evaluate=[{"tasks": ["bios_qa"]}], train__betas=[0.9, 0.99])
    assert Cell.model_validate_json(before.model_dump_json()) == before
    assert Cell.model_validate(before.model_dump(mode="json")).hash8 == before.hash8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train__tokens": 10}, "exactly one of tokens and epochs"),
        ({"train__accumulate": 3}, "divisor of batch_rows"),
        ({"model__family": "gru"}, "gru"),
        ({"model__base": "w33"}, "w33"),
        ({"train__lr": "fast"}, "lr"),
        ({"data__persons": 5}, "persons"),
        ({"model__half_keys": 5}, "half_keys"),
        ({"train__betas": [0.9, 1.0]}, r"betas\.1"),
        ({"train__betas": [-0.1, 0.9]}, r"betas\.0"),
        ({"data__zipf": 1000.0}, "zipf"),
        ({"seed": 2**63}, "seed"),
        ({"train__epochs": 1e300}, r"train\.epochs\n.*less than 1000000000000000000"),
        ({"train__epochs": None, "train__tokens": 2**63}, r"train\.tokens\n.*less than 9223372036854775808"),
    ],
)
def test_an_invalid_field_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        cell(**change)


def test_a_cell_is_frozen() -> None:
    with pytest.raises(ValidationError):
        cell().seed = 3  # type: ignore[misc]


def memory(train__table_optimizer: str = "row_wise", seed: int = 0, **changes: Any) -> Cell:
    model = {"family": "memory_plus", "base": "w32", "half_keys": 32, **changes}
    return cell(model=model, train__table_optimizer=train__table_optimizer, seed=seed)


def test_variants_are_the_settings_that_differ_from_the_most_common_value() -> None:
    cells = [
        memory(),
        memory(half_keys=64),
        memory(qk_norm=True),
        memory(placement=[0], k_dim=32),
        cell(train__log_every=3),
        cell(seed=1),
        cell(train__lr=2e-3),
        cell(train__lr=2e-3, seed=1),
        cell(model__base="w64", train__lr=5e-3),
        cell(model__base="w64", train__lr=5e-3, data__people=51),
    ]
    by_run = variants(cells)
    assert [by_run[member.run_name] for member in cells] == [
        {},
        {},
        {"qk_norm": True},
        {"k_dim": 32, "placement": [0]},
        {"train.lr": 1e-3},
        {"train.lr": 1e-3},
        {"train.lr": 2e-3},
        {"train.lr": 2e-3},
        {"data.people": 50},
        {"data.people": 51},
    ]


def test_data_files_are_distinguished_by_path() -> None:
    def on(path: str, content: str) -> Cell:
        return cell(data={"kind": "text", "path": path, "fingerprint": content * 64}, train__epochs=1.0)

    by_run = variants([on("here/a", "a"), on("b", "b")])
    assert list(by_run.values()) == [{"data.path": "here/a"}, {"data.path": "b"}]


def test_files_to_evaluate_on_are_distinguished_by_path() -> None:
    def scored_on(path: str, content: str) -> Cell:
        data = {"kind": "text", "path": "a", "fingerprint": "a" * 64}
        return cell(data=data | {"validation": path, "validation_fingerprint": content * 64}, train__epochs=1.0)

    by_run = variants([scored_on("here/v", "c"), scored_on("w", "d")])
    assert list(by_run.values()) == [{"data.validation": "here/v"}, {"data.validation": "w"}]


def test_the_display_name_has_the_variant_on_a_second_line() -> None:
    assert display_name("run", {}) == "run"
    assert display_name("run", {"k_dim": 32, "placement": [0]}) == "run\n  k_dim=32 placement=[0]"


def test_a_copy_with_another_value_has_another_hash_and_compares_by_its_fields() -> None:
    first = cell()
    before = first.hash8
    other = first.model_copy(update={"seed": first.seed + 1})
    assert other.hash8 != before
    assert other.model_copy(update={"seed": first.seed}).hash8 == before
    assert (first.run_name.endswith(before), other.run_name.endswith(other.hash8)) == (True, True)
    assert other.model_copy(update={"seed": first.seed}).run_name == first.run_name
    assert other.model_copy(update={"seed": first.seed}) == cell()
    assert "hash8" not in first.model_dump()


def test_tables_are_switched_off_only_where_there_are_tables() -> None:
    off = [{"tasks": ["bios_storage"], "table_off": True}]
    memory = {"family": "pkm", "base": "w32", "half_keys": 16, "top_k": 4}
    assert cell(model=memory, evaluate=off).hash8 == cell(model=memory).hash8
    for model in ({"family": "dense", "base": "w32"}, memory | {"control": "dense"}):
        with pytest.raises(ValidationError, match=r"evaluate.table_off: got True"):
            cell(model=model, evaluate=off)
