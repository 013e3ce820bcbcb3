"""Labels of variants, and the keys that runs have to share to be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SHAPE = ("layers", "dim", "heads", "kv_heads", "ffn_hidden")
TABLE_SIZES = ("half_keys", "head_rows", "table_rows")
"""Fields of a model that set how many rows its tables have."""
NAMED_FIRST = {"model.half_keys": "k{}", "model.ffn_hidden": "ffn{}"}
"""Settings that every label of a model with them starts with."""
PATHS = ("path", "validation")
"""Settings of data and tokenizers that are paths; the hash of what is there is the setting next to each."""
OUTSIDE_A_LABEL = ("seed", "evaluate")
AFTER_TRAINING = ("quantised", "kept_rows")
"""Settings of a run that is made from a trained one (docs/serving-tables.md)."""


def labels(cells: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> list[str]:
    """Return the variant of each cell: family, table or width, and what else varies within its family and base.

    A setting is named only where it has a value: of `control: [null, one_row]`, the first is the family itself.

    Args:
        cells: The cells.
        without: Settings that do not distinguish variants: dotted names such as `train.lr`, or whole sections.
    """
    settings = settings_of(cells, without)
    varying = _varying(settings)
    return [_label(options, varying[_group(options)]) for options in settings]


def labels_across_bases(cells: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> list[str]:
    """Return the variant of each cell under one name at all bases: what varies at any base is named at every base.

    Args:
        cells: The cells.
        without: Settings that do not distinguish variants, as for `labels`.
    """
    settings = settings_of(cells, without)
    of_family: dict[str, set[str]] = {}
    for (family, _), names in _varying(settings).items():
        of_family.setdefault(family, set()).update(names)
    return [_label(options, sorted(of_family[_group(options)[0]])) for options in settings]


def trained_labels(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the variant of each cell, whatever is done to its tables after training."""
    return labels(cells, AFTER_TRAINING)


def settings_of(cells: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the settings of each cell that may distinguish variants, by dotted name; `without` as for `labels`."""
    omitted = {*OUTSIDE_A_LABEL, *without}
    sections = [flat({name: value for name, value in cell.items() if name not in omitted}) for cell in cells]
    return [{name: value for name, value in options.items() if name not in omitted} for options in sections]


def _group(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return family and base."""
    return settings["model.family"], settings["model.base"]


def _varying(settings: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Return the names of the settings that vary within each family and base."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for options in settings:
        groups.setdefault(_group(options), []).append(options)
    varying = {}
    for group, members in groups.items():
        values: dict[str, set[str]] = {}
        for options in members:
            for name, value in options.items():
                values.setdefault(name, set()).add(repr(value))
        everywhere = {name for name in values if all(name in options for options in members)}
        varying[group] = [
            name
            for name in sorted(values)
            if len(values[name]) > 1 or (name not in everywhere and values[name] != {"None"})
        ]
    return varying


def _label(settings: Mapping[str, Any], varying: Sequence[str]) -> str:
    """Return the name of a variant: its family, its table or width, and the settings that vary."""
    parts = [form.format(settings[name]) for name, form in NAMED_FIRST.items() if settings.get(name)]
    others = [name for name in varying if name not in NAMED_FIRST and settings.get(name) is not None]
    return " ".join([settings["model.family"], *parts, *(_named(name, settings[name]) for name in others)])


def _named(name: str, value: Any) -> str:
    """Return a setting by the last part of its name; the hash of a file by what the file is, and in eight digits."""
    if name.endswith("fingerprint"):  # such as data.tokenizer.fingerprint and data.validation_fingerprint
        return f"{name.removesuffix('fingerprint').rstrip('._').split('.')[-1]}={value[:8]}"
    return f"{name.split('.')[-1]}={value}"


def flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted names, without paths, which are not part of a cell's identity, and without the
    hash of a parent, which differs between seeds."""
    settings: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{key}.")
        elif key not in (*PATHS, "parent"):
            settings[prefix + key] = value
    return settings


def is_reshaped(model: Mapping[str, Any]) -> bool:
    """Return whether a model overrides the shape of its base size, as controls of equal MACs do."""
    return any(model.get(name) is not None for name in SHAPE)


def pairing(cell: Mapping[str, Any]) -> str:
    """Return what two runs must share to be compared: base size and data, as JSON."""
    return json.dumps([cell["model"]["base"], flat(cell["data"])], sort_keys=True)


def training(cell: Mapping[str, Any]) -> str:
    """Return the training settings of a cell, as JSON."""
    settings = {key: value for key, value in (cell.get("train") or {}).items() if key != "parent"}
    return json.dumps(settings, sort_keys=True)
