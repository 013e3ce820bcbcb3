"""The parents of a grid: runs whose weights other cells of the grid start from (docs/grids.md).

    parents:
      pretrained: {data: {kind: bios}, train: {epochs: 40, lr: 4e-3}}
    blocks:
      - set: {train: {init_from: pretrained}}

A parent is a separate cell. Its fields are, from lowest to highest precedence: the `defaults`, the fields of its
family, the model options and the seed of the cell that starts from it, and those of its entry. One name therefore
serves every family and seed of a block, and a parent has the shape of its child unless the grid states another. A
parent of another family gets only the shape options.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.blocks import Flat, Point, applies, flatten, model_options, read_families
from suite.cells import Cell
from suite.errors import UserError
from suite.models.registry import ModelConfig
from suite.yaml_input import did_you_mean

INIT_FROM = "train.init_from"
INHERITED = ("model.", "seed", "threads")
"""Fields (or their beginnings) that a parent has from the cell that starts from it."""


@dataclass(frozen=True)
class Parents:
    """The `parents` section of a grid, and the other sections from which its parents get fields."""

    source: Path
    named: Mapping[str, Flat]
    defaults: Flat
    families: Mapping[str, Flat]
    overrides: Flat

    def of(self, child: Point, chain: Sequence[str] = ()) -> tuple[str, Point] | None:
        """Return the name and the fields of the parent in this grid that a point starts from; None: it has none.

        Args:
            child: The point.
            chain: Names of the parents that led to `child`, the youngest first.

        Raises:
            UserError: The parents form a cycle, or a model option does not apply to the parent's family.
        """
        name = child.fields.get(INIT_FROM)
        if not isinstance(name, str) or name not in self.named:
            return None
        if name in chain:
            cycle = " -> ".join((*chain[chain.index(name) :], name))
            raise UserError(f"{self.source}: parents: {cycle} is a cycle; one of them must not set {INIT_FROM}")
        own = self.named[name]
        inherited = {path: value for path, value in child.fields.items() if path.startswith(INHERITED)}
        family = {**inherited, **own, **self.overrides}.get("model.family")
        options = model_options(self.source, f"parents.{name}", family)
        if family != child.fields.get("model.family"):  # options of one name may differ in meaning between families
            inherited = {path: value for path, value in inherited.items() if applies(path, {*ModelConfig.model_fields})}
        for path in own:
            if not applies(path, options):
                option = path.split(".")[1]
                raise UserError(
                    f"{self.source}: parents.{name}.{path}: unknown option of {family}"
                    f"{did_you_mean(option, options)}, allowed: {', '.join(sorted(options))}"
                )
        merged = {**self.defaults, **self.families.get(str(family), {}), **inherited, **own, **self.overrides}
        fields = {path: value for path, value in merged.items() if applies(path, options)}
        return name, Point(fields, f"parents.{name}")

    def refuse_unused(self, used: set[str]) -> None:
        """Raise UserError for a parent from which no cell starts."""
        unused = [name for name in self.named if name not in used]
        if unused:
            raise UserError(f"{self.source}: parents.{unused[0]}: no cell has it as {INIT_FROM}; use or remove it")


def read_parents(source: Path, content: dict[str, Any], overrides: Flat) -> Parents:
    """Read the parents of a grid.

    Args:
        source: The grid's file, for error messages.
        content: The file's content.
        overrides: Fields set on the command line.

    Raises:
        UserError: A section has the wrong shape.
    """
    named = {
        str(name): flatten(source, f"parents.{name}", fields or {})
        for name, fields in (content.get("parents") or {}).items()
    }
    defaults = flatten(source, "defaults", content.get("defaults") or {})
    return Parents(source, named, defaults, read_families(source, content.get("families") or {}), overrides)


def with_identified_parent(cell: Cell) -> Cell:
    """Return the cell with the hash of the run that `train.init_from` names, unless the hash is set already.

    A run is named by its name, which ends in its hash, or by its path, whose cell.json states the hash.

    Raises:
        UserError: It is neither.
    """
    init_from = cell.train.init_from
    if init_from is None or cell.train.parent is not None:
        return cell
    record = Path(init_from) / "cell.json"
    if os.path.isfile(record):  # unlike Path.is_file, false for a text that is too long for a path
        try:
            return cell.starting_from(str(json.loads(record.read_bytes())["hash"]))
        except (ValueError, KeyError, OSError):
            raise UserError(f"{INIT_FROM}: got {init_from!r}, whose cell.json cannot be read; restore it") from None
    name = re.fullmatch(r"[\w-]+-([0-9a-f]{8})", init_from)
    if name is None:
        allowed = "a name under parents of the grid, the name of a run (it ends in its hash), or the path of a run"
        raise UserError(f"{INIT_FROM}: got {init_from!r}, allowed: {allowed}{import_hint(init_from)}")
    return cell.starting_from(name[1])


def import_hint(run: str) -> str:
    """Return what makes a run of a folder that holds a checkpoint of transformers, or an empty string."""
    return "; suite import makes a run of a checkpoint" if os.path.isfile(Path(run, "config.json")) else ""
