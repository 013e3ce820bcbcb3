"""`suite fields`: every field of the schema, with the default that a cell really gets."""

import json
from typing import Any

import pytest
from cli_runner import Suite

from suite.cells import Cell
from suite.cli.fields import CellField, list_fields
from suite.identity import identity
from suite.models import registry

CELL = {
    "model": {"family": "dense", "base": "w32"},
    "data": {"kind": "bios", "people": 30},
    "train": {"batch_rows": 4, "epochs": 1, "lr": 5e-3},
}


def value_of(content: dict, path: str) -> Any:
    for name in filter(None, path.split(".")):
        content = content[name]
    return content


def fields_of(family: str, kind: str) -> dict[str, CellField]:
    labels = {family, kind}
    return {row.field: row for row in list_fields() if not row.applies_to or labels & set(row.applies_to)}


def test_defaults_are_those_of_a_validated_cell() -> None:
    dumped = Cell.model_validate(CELL).model_dump(mode="json")
    given = {"model.family", "model.base", "data.kind", "data.people", "train.batch_rows", "train.epochs", "train.lr"}
    rows = fields_of("dense", "bios")
    assert given - set(rows) == set()
    for path, row in rows.items():
        if path in given or path.startswith("evaluate[]"):
            continue
        assert not row.required, path
        assert row.default == value_of(dumped, path), path


def test_identity_is_what_changes_the_hash() -> None:
    rows = fields_of("dense", "bios")
    samples = {"train.log_every": 3, "train.weight_decay": 0.2, "data.world": 4, "seed": 2, "train.keep_checkpoints": 9}
    for path, value in samples.items():
        changed = json.loads(json.dumps(CELL))
        *parents, name = path.split(".")
        value_of(changed, ".".join(parents))[name] = value
        differs = identity(Cell.model_validate(changed)) != identity(Cell.model_validate(CELL))
        assert differs == rows[path].identity, path


def test_options_of_one_family_name_it() -> None:
    keys = {row.applies_to: row for row in list_fields("model.half_keys")}
    assert keys[("peer",)].default == registry.family("peer").config.model_fields["half_keys"].default
    assert all(families for families in keys)
    assert list_fields("model.dim")[0].applies_to == ()


def test_a_prefix_selects_whole_names(suite: Suite) -> None:
    rows = json.loads(suite("fields", "train", "--json").stdout)["fields"]
    assert {row["field"].split(".")[0] for row in rows} == {"train"}
    assert {row["field"] for row in rows} >= {"train.lr", "train.schedule"}
    assert "train.lr" in suite("fields", "train.lr").stdout
    refused = suite("fields", "trai")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "trai" in refused.stderr
    assert "train" in refused.stderr


@pytest.mark.parametrize("prefix", ["data", "evaluate", "seed"])
def test_sections_are_listed(prefix: str, suite: Suite) -> None:
    assert suite("fields", prefix).returncode == 0


def test_every_field_has_a_meaning() -> None:
    assert [row.field for row in list_fields() if not row.meaning] == []
