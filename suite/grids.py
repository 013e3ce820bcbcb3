"""Grids: YAML files that list the cells to run (docs/grids.md describes the format)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from suite.baselines import checks, loading
from suite.blocks import Flat, Point, flatten, included_cells, points, refuse_duplicates
from suite.cells import Cell, TrainConfig, with_current_names
from suite.contrast import Contrast, select
from suite.errors import UserError
from suite.identity import NOT_IDENTITY
from suite.models import registry
from suite.parents import INIT_FROM, Parents, read_parents, with_identified_parent
from suite.shipped import shipped
from suite.yaml_input import did_you_mean, explain, parse_value, read_mapping, shown

GRID_FIELDS = {
    "defaults": dict,
    "families": dict,
    "parents": dict,
    "blocks": list,
    "exclude": list,
    "contrast": dict,
    "launch": dict,
    "grids": list,
}
"""The sections of a grid's file and their types."""
FILLED_IN = {
    "imported": "suite import makes a run of a checkpoint, from which train.init_from starts",
    "baseline": "--baseline names the file of an external family",
}
"""Fields of a cell that a grid cannot set, and what to use instead."""
MAX_SETTING = 24
"""Characters of a --set value in the name of a grid."""


@dataclass(frozen=True)
class Grid:
    """A named list of cells, in the order of the file."""

    name: str
    source: Path
    cells: tuple[Cell, ...]
    launch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the cluster profile that the grid sets (suite.launch.slurm.profile)."""
    contrast: Contrast | None = None
    """The primary contrast, if the grid declares one."""
    arguments: tuple[str, ...] = ()
    """The options, such as `--set=train.lr=1e-3`, that make these cells from those of the file."""


def load_grid(
    name_or_path: str,
    overrides: Mapping[str, str] | None = None,
    need_data: bool = True,
    baselines: Iterable[Path] = (),
) -> Grid:
    """Load a grid.

    Args:
        name_or_path: A name in grids/ or a path.
        overrides: Dotted field -> YAML text, set on every cell.
        need_data: Whether the data files must exist. Without them cells can be planned but not trained, because their
            hash does not cover the data.
        baselines: Files that register families; each model of such a family is checked.

    Raises:
        UserError: Anything in the file or the arguments is invalid.
    """
    loading.load_all(baselines)
    source = find_grid(name_or_path)
    content = _read(source)
    values = {path: parse_value(text, f"--set {path}") for path, text in (overrides or {}).items()}
    if content.get("grids"):
        cells = _cells_of_grids(source, content["grids"], values, need_data)
    else:
        cells = _cells_of_blocks(source, content, values, need_data)
    for config in {cell.model.model_dump_json(): cell.model for cell in cells if cell.baseline}.values():
        checks.check(config)
    contrast = _contrast(source, content, cells, bool(values))
    arguments = tuple(f"--set={path}={text}" for path, text in (overrides or {}).items())
    return Grid(_name(source, overrides or {}), source, cells, content.get("launch") or {}, contrast, arguments)


def _name(source: Path, overrides: Mapping[str, str]) -> str:
    """Return the name of the file, and the overrides that select other runs than those of the file.

    Records and reports of a grid are found by its name, so grids of different runs have different names.
    """
    chosen = (f"-{path}={_short(text)}" for path, text in overrides.items() if _selects_runs(path))
    return source.stem + "".join(chosen)


def _short(text: str) -> str:
    """Return a text as a part of a file name; texts that differ stay different."""
    plain = re.sub(r"[^\w.+-]+", "_", text)[:MAX_SETTING]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _selects_runs(path: str) -> bool:
    """Return whether another value of a cell's field makes another run."""
    section, _, name = path.partition(".")
    info = TrainConfig.model_fields.get(name) if section == "train" else None
    return section != "evaluate" and (info is None or info.json_schema_extra != NOT_IDENTITY)


def load_cell(path: Path, baselines: Iterable[Path] = ()) -> Cell:
    """Load one cell from a YAML or JSON file that holds its fields, or from the cell.json of a run.

    `baselines` are files that register families. Raises UserError.
    """
    loading.load_all([*baselines, *path.parent.glob("baseline.py")])
    content = read_mapping(path)
    if isinstance(content.get("cell"), dict):
        content = with_current_names(content["cell"])
    cell = _build_cell(path, Point(flatten(path, "", content), ""))
    if cell.baseline:
        checks.check(cell.model)
    return cell


def load_grid_or_cell(
    name_or_path: str, overrides: Mapping[str, str] | None = None, baselines: Iterable[Path] = ()
) -> Grid:
    """Load a grid, or the file of a cell as a grid of one.

    Args:
        name_or_path: A grid's name or path, or the path of a cell's file.
        overrides: Fields to set; for grids only.
        baselines: Files that register families.

    Raises:
        UserError: The file or an argument is invalid.
    """
    path = Path(name_or_path)
    if not os.path.isfile(path) or not {"model", "cell"} & set(read_mapping(path)):
        return load_grid(name_or_path, overrides, baselines=baselines)
    if overrides:
        raise UserError(f"--set: applies to grids, but {path} is a cell; change the file")
    cell = load_cell(path, baselines)
    return Grid(cell.run_name, path, (cell,))


def find_grid(name_or_path: str, where: str = "GRID") -> Path:
    """Return the file of a grid: a path, or a name in ./grids or among the grids of this project.

    Raises UserError, which names the argument or field `where`.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not os.path.isfile(path):  # unlike Path.is_file, false for a text that is too long for a path
            raise UserError(f"{where}: got {name_or_path!r}, which is not a file; allowed: {_allowed_grids()}")
        return path
    folders = _grid_folders()
    for folder in folders:
        if os.path.isfile(folder / f"{name_or_path}.yaml"):
            return folder / f"{name_or_path}.yaml"
    hint = did_you_mean(name_or_path, [path.stem for folder in folders for path in folder.glob("*.yaml")])
    raise UserError(f"{where}: got {name_or_path!r}{hint}, allowed: {_allowed_grids()}")


def _grid_folders() -> list[Path]:
    return [Path("grids"), shipped("grids")]


def _allowed_grids() -> str:
    names = sorted({path.stem for folder in _grid_folders() for path in folder.glob("*.yaml")})
    return f"a path to a .yaml file or one of {', '.join(names) or '(grids/ is empty)'}"


def _read(source: Path) -> dict[str, Any]:
    """Return the sections of a grid's file, with environment variables replaced in those that select cells."""
    content = read_mapping(source)
    _check_shape(source, content)
    selecting = {name: content[name] for name in ("exclude", "contrast") if name in content}
    return content | {name: _expand(value, f"{source}: {name}", "set it") for name, value in selecting.items()}


def _check_shape(source: Path, content: dict[str, Any]) -> None:
    """Raise UserError for an unknown section, a section of the wrong type, or sections that exclude each other."""
    if {"model", "cell"} & content.keys():
        raise UserError(f"{source}: is the file of a cell, not of a grid; run it with suite train {source}")
    for field, value in content.items():
        if field not in GRID_FIELDS:
            hint = did_you_mean(field, GRID_FIELDS)
            raise UserError(f"{source}: {field}: unknown field{hint}, allowed: {', '.join(GRID_FIELDS)}")
        if value is not None and not isinstance(value, GRID_FIELDS[field]):
            allowed = "a mapping" if GRID_FIELDS[field] is dict else "a list"
            raise UserError(f"{source}: {field}: got {shown(value)}, allowed: {allowed}")
    if content.get("grids"):
        others = sorted(set(content) - {"grids", "contrast", "launch"})
        if others:
            raise UserError(f"{source}: {others[0]}: not allowed together with grids, allowed: contrast and launch")
    elif not content.get("blocks"):
        raise UserError(f"{source}: blocks: missing; a grid needs at least one block")


def _contrast(source: Path, content: dict[str, Any], cells: tuple[Cell, ...], changed: bool) -> Contrast | None:
    """Return the declared contrast; None where --set has changed the cells so that it does not fit them."""
    if not content.get("contrast"):
        return None
    try:
        return select(source, content["contrast"], cells)
    except UserError:
        if changed:
            return None
        raise


def _cells_of_grids(source: Path, names: list[Any], overrides: Flat, need_data: bool) -> tuple[Cell, ...]:
    """Return the cells of other grids, each once; a cell of several grids has the evaluations of all of them."""
    cells: list[Cell] = []
    for name in names:
        sibling = source.parent / f"{name}.yaml"
        inner = sibling if os.path.isfile(sibling) else find_grid(str(name), f"{source}: grids")
        content = _read(inner)
        if content.get("grids"):
            raise UserError(f"{source}: grids: got {name!r}, which names grids itself, allowed: grids with blocks")
        cells += _cells_of_blocks(inner, content, overrides, need_data)
    return _each_once(cells)


def _cells_of_blocks(source: Path, content: dict[str, Any], overrides: Flat, need_data: bool) -> tuple[Cell, ...]:
    """Return the parents in a grid, then the cells of its blocks without those that it excludes."""
    planned = points(source, content, overrides)
    parents = read_parents(source, content, overrides)
    lineages = [_lineage(source, point, parents, need_data) for point in planned]
    parents.refuse_unused({str(cell.train.init_from) for lineage in lineages for cell in lineage})
    included = included_cells(source, content.get("exclude") or [], [lineage[-1] for lineage in lineages])
    if not any(included):
        raise UserError(f"{source}: exclude: leaves no cell; exclude fewer")
    chosen = [lineage for lineage, is_included in zip(lineages, included, strict=True) if is_included]
    labels = [point.label for point, is_included in zip(planned, included, strict=True) if is_included]
    refuse_duplicates(source, [lineage[-1] for lineage in chosen], labels)
    ancestors = [cell for lineage in chosen for cell in lineage[:-1]]
    return _each_once([*ancestors, *(lineage[-1] for lineage in chosen)])


def _each_once(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Return the distinct cells in order; one that occurs several times has the evaluations of all."""
    distinct: dict[str, Cell] = {}
    for cell in cells:
        earlier = distinct.get(cell.run_name)
        distinct[cell.run_name] = cell if earlier is None else earlier.with_evaluations(cell.evaluate)
    return tuple(distinct.values())


def _lineage(
    source: Path, point: Point, parents: Parents, need_data: bool, chain: tuple[str, ...] = ()
) -> tuple[Cell, ...]:
    """Return the cell of a point, after the parents in the same grid that it directly or indirectly starts from."""
    named_parent = parents.of(point, chain)
    if named_parent is None:
        return (_build_cell(source, point, need_data),)
    name, parent = named_parent
    ancestors = _lineage(source, parent, parents, need_data, (*chain, name))
    fields = {**point.fields, INIT_FROM: name, "train.parent": ancestors[-1].hash8}
    return *ancestors, _build_cell(source, dataclasses.replace(point, fields=fields), need_data)


def _build_cell(source: Path, point: Point, need_data: bool = True) -> Cell:
    """Validate a cell, with environment variables replaced and files identified by their content."""
    where = f"{source}: {point.label}: " if point.label else f"{source}: "
    nested: dict[str, Any] = {}
    for path, value in point.fields.items():
        _put(nested, path, _expand(value, f"{where}{path}", f"set it, or give --set {path}=..."), where)
    for field, remedy in FILLED_IN.items():
        if nested.get(field) is not None:
            raise UserError(f"{where}{field}: got {shown(nested[field])}, allowed: only null; {remedy}")
    try:
        cell = Cell.model_validate(nested)
    except ValidationError as error:
        complaint = explain(error, Cell, nested)
        origin = point.origins.get(complaint.partition(": ")[0])
        raise UserError(f"{where}{f'from {origin}: ' if origin else ''}{complaint}") from None
    cell = cell.model_copy(update={"baseline": registry.family(cell.model.family).source})
    try:
        return with_identified_parent(cell).model_copy(update={"data": cell.data.identified()})
    except UserError as error:
        if not need_data:
            return cell
        raise UserError(f"{where}{error}") from None


def _put(nested: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set the value at a dotted path. Raises UserError if a part of the path already has a value of its own."""
    *parents, last = path.split(".")
    for depth, name in enumerate(parents):
        nested = nested.setdefault(name, {})
        if not isinstance(nested, dict):
            section = ".".join(parents[: depth + 1])
            raise UserError(f"{where}{section}: got {shown(nested)} as well as {path}; set one of them")
    nested[last] = value


def _expand(value: Any, where: str, remedy: str) -> Any:
    """Replace `${NAME}` in strings by the environment variable, within lists and mappings too.

    Args:
        value: The value as read from YAML.
        where: The file and the field, for messages.
        remedy: What to do about a variable that is not set.

    Raises:
        UserError: A variable is not set.
    """
    if isinstance(value, list):
        return [_expand(item, where, remedy) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, where, remedy) for key, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value

    def variable(match: re.Match[str]) -> str:
        if match.group(1) not in os.environ:
            raise UserError(f"{where}: the environment variable {match.group(1)} is not set; {remedy}")
        return os.environ[match.group(1)]

    return re.sub(r"\$\{(\w+)\}", variable, value)
