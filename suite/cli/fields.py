"""Every field that a cell may set, read from the schema: type, default, meaning, and whether it identifies a run.

The fields of `model` depend on the family and those of `data` on the kind, so one path may occur in several rows.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.table import Table

import suite.models  # noqa: F401  (registers the families)
from suite.cells import Cell
from suite.errors import UserError
from suite.identity import Frozen
from suite.models import registry
from suite.models.registry import ModelConfig
from suite.yaml_input import did_you_mean, models_in


@dataclass(frozen=True)
class CellField:
    """One field of a cell.

    `field` is the dotted path that a grid writes; `[]` marks the elements of a list, `*` a name that the grid chooses.
    `default` is also None if the field is required. `applies_to` names the families or data kinds that have the field;
    it is empty if all cells have it. `identity` is whether the field is part of the hash that identifies a run.
    """

    field: str
    type: str
    default: Any
    required: bool
    identity: bool
    applies_to: tuple[str, ...]
    meaning: str | None


def list_fields(prefix: str | None = None) -> list[CellField]:
    """Return the fields of a cell, or those under a dotted prefix such as `train`.

    Raises:
        UserError: No field has this prefix.
    """
    fields = _merged(_walk(Cell, "", identity=True, applies_to=()))
    if prefix is None:
        return fields
    chosen = [field for field in fields if f"{field.field}.".replace("[]", "").startswith(f"{prefix}.")]
    if not chosen:
        sections = list(dict.fromkeys(field.field.split(".")[0].removesuffix("[]") for field in fields))
        paths = [field.field for field in fields]
        hint = did_you_mean(prefix, [*sections, *paths])
        raise UserError(f"PREFIX: got {prefix!r}{hint}, allowed: a field, or one of {', '.join(sections)}")
    return chosen


def fields_json(fields: list[CellField]) -> dict[str, Any]:
    """Return the document that `suite fields --json` prints."""
    return {"fields": [asdict(field) for field in fields]}


def fields_table(fields: list[CellField]) -> Table:
    """Return the fields as a table."""
    table = Table("field", "type", "default", "identity", "applies to", "meaning")
    for field in fields:
        default = "(required)" if field.required else json.dumps(field.default)
        identity = "yes" if field.identity else "no"
        table.add_row(field.field, field.type, default, identity, ", ".join(field.applies_to), field.meaning or "")
    return table


def _walk(
    model: type[BaseModel],
    prefix: str,
    identity: bool,
    applies_to: tuple[str, ...],
    defaults: BaseModel | None = None,
) -> Iterator[CellField]:
    """Yield the fields of a model and of the models in it.

    Args:
        model: The class to list.
        prefix: Path of the model within the cell, with a dot at its end.
        identity: Whether the model as a whole is part of the identity.
        applies_to: The families or data kinds that have this model.
        defaults: An instance whose values are the defaults, where the field that holds the model has one.
    """
    for name, info in model.model_fields.items():
        path = prefix + name
        extra = info.json_schema_extra
        in_identity = identity and not (isinstance(extra, dict) and extra.get("identity") is False)
        parts = _parts(info)
        if not parts:
            default = getattr(defaults, name) if defaults is not None else info.get_default(call_default_factory=True)
            required = defaults is None and info.is_required()
            value = None if required else to_jsonable_python(default)
            yield CellField(
                path, type_name(info.annotation), value, required, in_identity, applies_to, info.description
            )
            continue
        origin = typing.get_origin(info.annotation)
        inner = path + (".*." if origin is dict else "[]." if origin is tuple else ".")
        for label, part in parts:
            labels = tuple(f"{outer} {label}".strip() for outer in applies_to or ("",)) if label else applies_to
            instance = info.default if isinstance(info.default, part) else None
            yield from _walk(part, inner, in_identity, labels, instance)


def _parts(info: FieldInfo) -> list[tuple[str, type[BaseModel]]]:
    """Return the models that a field may hold, each with the family or kind that selects it ('' for one alone)."""
    models = models_in(info.annotation)
    if models == [ModelConfig]:
        return [(name, registry.family(name).config) for name in registry.families()]
    variants = models[0].variants() if models and issubclass(models[0], Frozen) else {}
    return list(variants.items()) or [("", model) for model in models]


def _merged(fields: Iterator[CellField]) -> list[CellField]:
    """Join rows that differ only in `applies_to`, which becomes empty if every family or kind has the field."""
    groups: dict[str, list[CellField]] = {}
    for field in fields:
        key = json.dumps(asdict(field) | {"applies_to": None})
        groups.setdefault(key, []).append(field)
    labels: dict[str, set[str]] = {}
    for members in groups.values():
        for field in members:
            labels.setdefault(field.field.rpartition(".")[0], set()).update(field.applies_to)
    merged = []
    for members in groups.values():
        first = members[0]
        applies_to = tuple(label for field in members for label in field.applies_to)
        if set(applies_to) == labels[first.field.rpartition(".")[0]]:
            applies_to = tuple(dict.fromkeys(label.rpartition(" ")[0] for label in applies_to if " " in label))
        merged.append(CellField(**{**asdict(first), "applies_to": applies_to}))
    return merged


def type_name(annotation: Any) -> str:
    """Return a type as a grid's author reads it: `int`, `fp32 | bf16`, `list of int`. None is left out."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    arguments = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    return " | ".join(type_name(part) for part in arguments)
