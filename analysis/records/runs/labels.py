"""Labels of variants, and the keys that runs have to share to be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SHAPE = ("layers", "dim", "heads", "kv_heads", "ffn_hidden")
NAMED_FIRST = {"model.half_keys": "k{}", "model.ffn_hidden": "ffn{}"}
"""Settings that every label of a model with them starts with."""
OUTSIDE_A_LABEL = ("seed", "evaluate")
AFTER_TRAINING = ("quantised", "kept_rows")
"""Settings of a run that is made from a trained one (docs/serving-tables.md)."""


def labels(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the variant of each cell: family, table or width, and what else varies within its family and base.

    A setting is named only where it has a value: of `control: [null, one_row]`, the first is the family itself.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for position, cell in enumerate(cells):
        groups.setdefault((cell["model"]["family"], cell["model"]["base"]), []).append(position)
    result = [""] * len(cells)
    for (family, _), members in groups.items():
        settings = [flat({k: v for k, v in cells[at].items() if k not in OUTSIDE_A_LABEL}) for at in members]
        values: dict[str, set[str]] = {}
        for options in settings:
            for key, value in options.items():
                values.setdefault(key, set()).add(repr(value))
        everywhere = {key for key in values if all(key in options for options in settings)}
        varying = [
            key
            for key in sorted(values)
            if key not in NAMED_FIRST and (len(values[key]) > 1 or (key not in everywhere and values[key] != {"None"}))
        ]
        for at, options in zip(members, settings, strict=True):
            parts = [form.format(options[key]) for key, form in NAMED_FIRST.items() if options.get(key)]
            parts += [f"{key.split('.')[-1]}={options[key]}" for key in varying if options.get(key) is not None]
            result[at] = " ".join([family, *parts])
    return result


def trained_labels(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the variant of each cell, whatever is done to its tables after training."""
    return labels([{key: value for key, value in cell.items() if key not in AFTER_TRAINING} for cell in cells])


def flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted names, without paths, which are not part of a cell's identity, and without the
    hash of a parent, which differs between seeds."""
    settings: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{key}.")
        elif key not in ("path", "parent"):
            settings[prefix + key] = value
    return settings


def is_reshaped(model: Mapping[str, Any]) -> bool:
    """Return whether a model overrides the shape of its base size, as controls of equal MACs do."""
    return any(model.get(name) is not None for name in SHAPE)


def pairing(cell: Mapping[str, Any]) -> str:
    """Return what two runs must share to be compared: base size and data, as JSON."""
    data = {key: value for key, value in cell["data"].items() if key != "path"}
    return json.dumps([cell["model"]["base"], data], sort_keys=True)


def training(cell: Mapping[str, Any]) -> str:
    """Return the training settings of a cell, as JSON."""
    settings = {key: value for key, value in (cell.get("train") or {}).items() if key != "parent"}
    return json.dumps(settings, sort_keys=True)
