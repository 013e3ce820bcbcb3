"""From the blocks of a grid's file to the fields of each cell.

The format is described in docs/grids.md. A block is a product of its axes. Later settings override earlier ones:
defaults, families, the block's `set`, its `axes`, and then --set of the command line.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import suite.models  # noqa: F401  (registers the families)
from suite.cells import Cell, flat
from suite.contrast import matches
from suite.errors import UserError
from suite.models import registry
from suite.yaml_input import did_you_mean, shown

SECTIONS = ("model", "data", "train")
MAX_COMBINATIONS = 100_000
"""Combinations of axis values in a grid; to list as many cells takes minutes."""

Flat = dict[str, Any]
"""Dotted path -> value: `{"train.lr": 0.001}`."""


@dataclass(frozen=True)
class Point:
    """The fields of one future cell, and where in the file they come from.

    `label` names the block and the axis values; `origins` maps the fields that are set outside the block to the section
    that sets them.
    """

    fields: Flat
    label: str
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)


def points(source: Path, content: dict[str, Any], overrides: Flat) -> list[Point]:
    """Return the points of all blocks, before exclusion.

    Args:
        source: The grid's file, for error messages.
        content: The file's content.
        overrides: Fields set on the command line.

    Raises:
        UserError: A section has the wrong shape, the axes have too many combinations, a family is unknown, or no
            family of the grid has an option.
    """
    defaults = flatten(source, "defaults", content.get("defaults") or {})
    families = read_families(source, content.get("families") or {})
    layers = [("defaults", list(defaults)), ("--set", list(overrides))]
    result: list[Point] = []
    combinations = 0
    for number, block in enumerate(content["blocks"], start=1):
        where = f"blocks[{number}]"
        if not isinstance(block, dict) or (set(block) - {"set", "axes"}):
            raise UserError(f"{source}: {where}: got {shown(block)}, allowed: a mapping with `axes` and `set`")
        fixed = flatten(source, f"{where}.set", block.get("set") or {})
        axes = _axes(source, f"{where}.axes", block.get("axes") or {})
        combinations += math.prod(len(values) for values in axes.values())
        if combinations > MAX_COMBINATIONS:
            raise UserError(
                f"{source}: {where}.axes: the grid has {combinations:,} combinations of values, allowed: at most "
                f"{MAX_COMBINATIONS:,}"
            )
        result += _block_points(source, where, defaults, families, fixed, axes, overrides)
        axis_paths = [path for values in axes.values() for value in values for path in value]
        layers += [(f"{where}.set", list(fixed)), (f"{where}.axes", axis_paths)]
    used = {point.fields["model.family"] for point in result}
    for where, paths in layers:
        _refuse_unknown_options(source, where, paths, used)
    return result


def _block_points(
    source: Path,
    where: str,
    defaults: Flat,
    families: dict[str, Flat],
    fixed: Flat,
    axes: dict[str, list[Flat]],
    overrides: Flat,
) -> Iterator[Point]:
    """Yield the points of one block: the product of its axes, without options that a family does not have.

    Args:
        source: The grid's file, for error messages.
        where: The block's place in the file.
        defaults: Fields of the `defaults` section.
        families: Fields of the `families` section, by family.
        fixed: Fields of the block's `set`.
        axes: Axis -> its values, each as the fields that it sets.
        overrides: Fields set on the command line.
    """
    seen: set[str] = set()
    for values in itertools.product(*axes.values()):
        chosen: Flat = {path: value for fields in values for path, value in fields.items()}
        name = {**defaults, **fixed, **chosen, **overrides}.get("model.family")
        options = model_options(source, where, name)
        applied = {path: value for path, value in chosen.items() if applies(path, options)}
        label = f"{where} ({', '.join(f'{path}={value}' for path, value in applied.items())})"
        if len(applied) < len(chosen):
            # The family lacks an option that is an axis: points that differ only in it are one.
            if label in seen:
                continue
            seen.add(label)
        family = families.get(str(name), {})
        merged = {**defaults, **family, **fixed, **applied, **overrides}
        origins = dict.fromkeys(defaults, "defaults") | dict.fromkeys(family, f"families.{name}")
        origins = {path: origin for path, origin in origins.items() if path not in fixed and path not in applied}
        origins |= dict.fromkeys(overrides, "--set")
        yield Point({path: value for path, value in merged.items() if applies(path, options)}, label, origins)


def read_families(source: Path, content: dict[str, Any]) -> dict[str, Flat]:
    """Return the fields of each family; its model options must be its own."""
    result = {}
    for name, fields in content.items():
        where = f"families.{name}"
        options = model_options(source, "families", name)
        result[str(name)] = flatten(source, where, fields or {})
        for path in result[str(name)]:
            if not applies(path, options):
                option = path.split(".")[1]
                allowed = ", ".join(sorted(options))
                hint = did_you_mean(option, options)
                raise UserError(f"{source}: {where}.{path}: unknown option{hint}, allowed: {allowed}")
    return result


def _axes(source: Path, where: str, content: Any) -> dict[str, list[Flat]]:
    """Return axis -> its values, each as the fields that it sets."""
    if not isinstance(content, dict):
        raise UserError(f"{source}: {where}: got {shown(content)}, allowed: a mapping of dotted fields to lists")
    axes: dict[str, list[Flat]] = {}
    for path, values in content.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{source}: {where}.{path}: got {shown(values)}, allowed: a list of at least one value")
        axes[str(path)] = [flatten(source, where, {path: value}) for value in values]
    return axes


def flatten(source: Path, where: str, content: Any, prefix: str = "") -> Flat:
    """Turn nested mappings into dotted paths; lists and scalars are values.

    Args:
        source: The file, for error messages.
        where: The section of the file.
        content: The mapping to flatten.
        prefix: The path of `content` within the cell.

    Raises:
        UserError: A value is not a mapping where one is needed.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source}: {where}: got {shown(content)}, allowed: a mapping of fields to values")
    fields: Flat = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            fields.update(flatten(source, where, value, f"{path}."))
        elif path in SECTIONS:
            raise UserError(f"{source}: {where}.{path}: got {shown(value)}, allowed: a mapping of fields to values")
        else:
            fields[path] = value
    return fields


def model_options(source: Path, where: str, name: object) -> set[str]:
    """Return the model options of a family. Raises UserError for an unknown family.

    Args:
        source: The grid's file, for error messages.
        where: The section of the file.
        name: The family's name.
    """
    try:
        return set(registry.family(name).config.model_fields)
    except ValueError:
        actual = "nothing" if name is None else repr(name)
        families = registry.families()
        hint = did_you_mean(name, families)
        allowed = f"{', '.join(families)}, and those of --baseline files"
        raise UserError(f"{source}: {where}: model.family: got {actual}{hint}, allowed: {allowed}") from None


def applies(path: str, options: set[str]) -> bool:
    """Return whether a family with these model options has the field."""
    section, _, rest = path.partition(".")
    return section != "model" or rest.split(".")[0] in options


def _refuse_unknown_options(source: Path, where: str, paths: list[str], used: set[str]) -> None:
    """Raise UserError for a model option that no family of the grid has; options of some families are allowed."""
    options = {option for name in used for option in registry.family(name).config.model_fields}
    for path in paths:
        if not applies(path, options):
            option = path.split(".")[1]
            hint = did_you_mean(option, options)
            raise UserError(
                f"{source}: {where}.{path}: unknown option of {', '.join(sorted(used))}{hint}, "
                f"allowed: {', '.join(sorted(options))}"
            )


def included_cells(source: Path, exclude: list[Any], cells: list[Cell]) -> list[bool]:
    """Return for each cell whether no exclusion matches it.

    Args:
        source: The grid's file, for error messages.
        exclude: The `exclude` section.
        cells: The cells of all blocks.

    Raises:
        UserError: An exclusion names an unknown field, or matches no cell.
    """
    if not exclude:
        return [True] * len(cells)
    settings = [flat(cell.model_dump(mode="json")) for cell in cells]
    paths = {path for fields in settings for path in fields}
    included = [True] * len(cells)
    for number, exclusion in enumerate(exclude, start=1):
        where = f"exclude[{number}]"
        wanted = flatten(source, where, exclusion)
        for path in wanted:
            if path not in paths:
                hint = did_you_mean(path, paths)
                raise UserError(f"{source}: {where}.{path}: unknown field{hint}, allowed: a field of a cell")
        excluded = [all(matches(fields, path, value) for path, value in wanted.items()) for fields in settings]
        if not any(excluded):
            raise UserError(f"{source}: {where}: {exclusion!r} matches no cell; correct or remove it")
        included = [was and not is_excluded for was, is_excluded in zip(included, excluded, strict=True)]
    return included


def refuse_duplicates(source: Path, cells: list[Cell], labels: list[str]) -> None:
    """Raise UserError if two cells of a grid are the same; `labels` name their places in the file.

    Args:
        source: The grid's file, for error messages.
        cells: The cells.
        labels: The place of each cell in the file.
    """
    first: dict[str, str] = {}
    for cell, label in zip(cells, labels, strict=True):
        if cell.run_name in first:
            raise UserError(
                f"{source}: duplicate cells: {first[cell.run_name]} and {label} are both {cell.run_name}; remove one"
            )
        first[cell.run_name] = label
