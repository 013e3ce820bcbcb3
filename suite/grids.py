"""YAML grids: a few lines that say which cells to run.

    defaults:                       # every cell starts from these fields
      model: {base: w32}
      data: {kind: bios, people: 60}
      train: {batch_rows: 8, epochs: 4, lr: 4e-3}
    families:                       # above the defaults, for cells of that family
      memory_plus: {model: {half_keys: 16}, train: {value_lr: 2e-2}}
    blocks:                         # each block is a product of its axes; a grid is all its blocks' cells
      - set: {train: {lr: 8e-3}}    # above the families, for every cell of the block
        axes:                       # above all; dotted paths, each a list of values
          model.family: [dense, memory_plus]
          model.half_keys: [16, 32]
          seed: [0, 1]
    exclude:                        # cells that match every entry of one of these are left out
      - {model.family: memory_plus, model.half_keys: 32, seed: [1]}
    contrast:                       # the comparison that the grid is run for (suite.contrast)
      treatment: {model.family: memory_plus, model.half_keys: 16}
      reference: {model.family: dense}
      metric: e50
    launch: {gpus: 16}              # on a cluster, above its profile's fields (clusters/example.yaml)

or, instead of all that but `contrast` and `launch`, `grids: [one, another]`: the cells of other grids, each once.

The fields are those of `suite.cells.Cell`. A field may be written nested or dotted, and an axis' value may be a
mapping that sets several fields together. What lies deeper in this list wins: defaults, families, set, axes, and
then the command line's `--set field=value`. A `model` option that a cell's family does not have is dropped, be it
an axis (which then multiplies nothing for that family), `set` or a default, as long as another family of the grid
has it. `${NAME}` in a text is taken from the environment. Two cells that are one and the same are an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import suite.models  # noqa: F401  (registers the families)
from suite.baselines import checks, loading
from suite.cells import Cell, flat, with_current_names
from suite.contrast import Contrast, matches, select
from suite.errors import UserError
from suite.models import registry
from suite.shipped import shipped
from suite.yaml_input import did_you_mean, explain, parse_value, read_mapping

SECTIONS = ("model", "data", "train")
GRID_FIELDS = {
    "defaults": dict,
    "families": dict,
    "blocks": list,
    "exclude": list,
    "contrast": dict,
    "launch": dict,
    "grids": list,
}

Flat = dict[str, Any]
"""Dotted path -> value: `{"train.lr": 0.001}`."""


@dataclass(frozen=True)
class Grid:
    """A named list of cells, in the file's order."""

    name: str
    source: Path
    cells: tuple[Cell, ...]
    launch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the grid sets of a cluster's profile (suite.launch.profiles)."""
    contrast: Contrast | None = None
    """The primary contrast, where the grid declares one."""


@dataclass(frozen=True)
class _Point:
    """A cell to be: its fields, where in the file it comes from, and which fields come from outside its block."""

    fields: Flat
    label: str
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_grid(
    name_or_path: str,
    overrides: Mapping[str, str] | None = None,
    need_data: bool = True,
    baselines: Iterable[Path] = (),
) -> Grid:
    """The grid of that name in grids/ or at that path, `overrides` (dotted path -> YAML text) on top.

    Without `need_data` files that are not there are no mistake, and the cells are not known by their content: enough to
    plan, not to train.
    `baselines`: files of families from outside the package, which are checked on every cell that uses them.
    Raises UserError, in one line, for whatever is wrong with it.
    """
    loading.load_all(baselines)
    source = find_grid(name_or_path)
    content = read_mapping(source)
    _check_shape(source, content)
    over = {path: parse_value(text, f"--set {path}") for path, text in (overrides or {}).items()}
    cells = _cells_of_grids(source, content, over, need_data) or _cells(source, content, over, need_data)
    for config in {cell.model.model_dump_json(): cell.model for cell in cells if cell.baseline}.values():
        checks.check(config)
    return Grid(source.stem, source, cells, content.get("launch") or {}, _contrast(source, content, cells, bool(over)))


def _contrast(source: Path, content: dict[str, Any], cells: tuple[Cell, ...], changed: bool) -> Contrast | None:
    """The declared contrast; cells changed by --set that it does not fit have none."""
    if not content.get("contrast"):
        return None
    try:
        return select(source, content["contrast"], cells)
    except UserError:
        if changed:
            return None
        raise


def _cells_of_grids(source: Path, content: dict[str, Any], over: Flat, need_data: bool) -> tuple[Cell, ...]:
    """The cells of the grids that this one names, a cell of several with the evaluations of all of them."""
    found: dict[str, Cell] = {}
    for name in content.get("grids") or []:
        beside = source.with_name(f"{name}.yaml")
        inner = beside if beside.is_file() else find_grid(str(name), f"{source}: grids")
        described = read_mapping(inner)
        _check_shape(inner, described)
        if described.get("grids"):
            raise UserError(f"{source}: grids: got {name!r}, which names grids itself, allowed: grids with blocks")
        for cell in _cells(inner, described, over, need_data):
            known = found.get(cell.run_name)
            found[cell.run_name] = cell if known is None else known.also_asked(cell.evaluate)
    return tuple(found.values())


def _cells(source: Path, content: dict[str, Any], over: Flat, need_data: bool) -> tuple[Cell, ...]:
    """The cells of a grid's blocks but for those excluded."""
    points = _points(source, content, over)
    cells = [_cell(source, point, need_data) for point in points]
    kept = _excluded(source, content.get("exclude") or [], cells)
    chosen = [(cell, point) for cell, point, keep in zip(cells, points, kept, strict=True) if keep]
    if not chosen:
        raise UserError(f"{source}: exclude: leaves no cell, allowed: exclusions that leave at least one")
    _refuse_duplicates(source, chosen)
    return tuple(cell for cell, _ in chosen)


def load_cell(path: Path, baselines: Iterable[Path] = ()) -> Cell:
    """One cell from a YAML or JSON file: its fields, or a run's cell.json. Raises UserError.

    `baselines`: as for a grid.
    """
    loading.load_all([*baselines, *path.parent.glob("baseline.py")])
    content = read_mapping(path)
    if isinstance(content.get("cell"), dict):
        content = with_current_names(content["cell"])
    cell = _cell(path, _Point(_flatten(path, "", content), ""))
    if cell.baseline:
        checks.check(cell.model)
    return cell


def load_grid_or_cell(
    name_or_path: str, overrides: Mapping[str, str] | None = None, baselines: Iterable[Path] = ()
) -> Grid:
    """A grid, or the file of a cell as a grid of one; `overrides` are for grids. Raises UserError."""
    path = Path(name_or_path)
    if not path.is_file() or not {"model", "cell"} & set(read_mapping(path)):
        return load_grid(name_or_path, overrides, baselines=baselines)
    if overrides:
        raise UserError(f"--set: got {next(iter(overrides))!r} beside the cell {path}, allowed: beside a grid")
    cell = load_cell(path, baselines)
    return Grid(cell.run_name, path, (cell,))


def find_grid(name_or_path: str, where: str = "GRID") -> Path:
    """The file of a grid: a path, or a name in grids/ here or beside the package. Raises UserError."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"{where}: got {name_or_path!r}, which is no file; allowed: {_known_grids()}")
        return path
    for folder in _grid_folders():
        if (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    names = [path.stem for folder in _grid_folders() for path in folder.glob("*.yaml")]
    raise UserError(f"{where}: got {name_or_path!r}{did_you_mean(name_or_path, names)}, allowed: {_known_grids()}")


def _grid_folders() -> list[Path]:
    return [Path("grids"), shipped("grids")]


def _known_grids() -> str:
    names = sorted({path.stem for folder in _grid_folders() for path in folder.glob("*.yaml")})
    return f"a path to a .yaml file or one of {', '.join(names) or '(grids/ is empty)'}"


def _check_shape(source: Path, content: dict[str, Any]) -> None:
    for field, value in content.items():
        if field not in GRID_FIELDS:
            known = ", ".join(GRID_FIELDS)
            raise UserError(f"{source}: {field}: unknown field{did_you_mean(field, GRID_FIELDS)}, allowed: {known}")
        if value is not None and not isinstance(value, GRID_FIELDS[field]):
            wanted = "a mapping" if GRID_FIELDS[field] is dict else "a list"
            raise UserError(f"{source}: {field}: got {value!r}, allowed: {wanted}")
    if content.get("grids"):
        others = sorted(set(content) - {"grids", "contrast", "launch"})
        if others:
            raise UserError(f"{source}: {others[0]}: cannot stand next to grids, allowed: contrast and launch")
        return
    if not content.get("blocks"):
        raise UserError(f"{source}: blocks: got nothing, allowed: a list with at least one block")


def _points(source: Path, content: dict[str, Any], over: Flat) -> list[_Point]:
    """All cells to be, before exclusion."""
    defaults = _flatten(source, "defaults", content.get("defaults") or {})
    families = _families(source, content.get("families") or {})
    layers = [("defaults", list(defaults)), ("--set", list(over))]
    points: list[_Point] = []
    for number, block in enumerate(content["blocks"], start=1):
        where = f"blocks[{number}]"
        if not isinstance(block, dict) or (set(block) - {"set", "axes"}):
            raise UserError(f"{source}: {where}: got {block!r}, allowed: a mapping with `axes` and `set`")
        fixed = _flatten(source, f"{where}.set", block.get("set") or {})
        axes = _axes(source, f"{where}.axes", block.get("axes") or {})
        points += _block_points(source, where, defaults, families, fixed, axes, over)
        paths = [path for values in axes.values() for value in values for path in value]
        layers += [(f"{where}.set", list(fixed)), (f"{where}.axes", paths)]
    used = {point.fields["model.family"] for point in points}
    for where, paths in layers:
        _refuse_unknown_options(source, where, paths, used)
    return points


def _block_points(
    source: Path,
    where: str,
    defaults: Flat,
    families: dict[str, Flat],
    fixed: Flat,
    axes: dict[str, list[Flat]],
    over: Flat,
) -> Iterator[_Point]:
    seen: set[str] = set()
    for values in itertools.product(*axes.values()):
        chosen: Flat = {path: value for part in values for path, value in part.items()}
        name = {**defaults, **fixed, **chosen, **over}.get("model.family")
        options = _options(source, where, name)
        applied = {path: value for path, value in chosen.items() if _applies(path, options)}
        label = f"{where} ({', '.join(f'{path}={value}' for path, value in applied.items())})"
        if len(applied) < len(chosen):
            # Dropped axes multiply nothing: the points that differed in them alone are one.
            if label in seen:
                continue
            seen.add(label)
        family = families.get(str(name), {})
        merged = {**defaults, **family, **fixed, **applied, **over}
        origins = dict.fromkeys(defaults, "defaults") | dict.fromkeys(family, f"families.{name}")
        origins = {path: origin for path, origin in origins.items() if path not in fixed and path not in applied}
        origins |= dict.fromkeys(over, "--set")
        yield _Point({path: value for path, value in merged.items() if _applies(path, options)}, label, origins)


def _families(source: Path, content: dict[str, Any]) -> dict[str, Flat]:
    """The per-family overrides; their model options must be that family's own."""
    result = {}
    for name, fields in content.items():
        where = f"families.{name}"
        options = _options(source, "families", name)
        result[str(name)] = _flatten(source, where, fields or {})
        for path in result[str(name)]:
            if not _applies(path, options):
                option = path.split(".")[1]
                known = ", ".join(sorted(options))
                raise UserError(
                    f"{source}: {where}.{path}: unknown option{did_you_mean(option, options)}, allowed: {known}"
                )
    return result


def _axes(source: Path, where: str, content: Any) -> dict[str, list[Flat]]:
    if not isinstance(content, dict):
        raise UserError(f"{source}: {where}: got {content!r}, allowed: a mapping of dotted fields to lists")
    axes: dict[str, list[Flat]] = {}
    for path, values in content.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{source}: {where}.{path}: got {values!r}, allowed: a list of at least one value")
        axes[str(path)] = [_flatten(source, where, {path: value}) for value in values]
    return axes


def _flatten(source: Path, where: str, content: Any, prefix: str = "") -> Flat:
    """Nested mappings as dotted paths; lists and scalars are values."""
    if not isinstance(content, dict):
        raise UserError(f"{source}: {where}: got {content!r}, allowed: a mapping of fields to values")
    flat: Flat = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flatten(source, where, value, f"{path}."))
        elif path in SECTIONS:
            raise UserError(f"{source}: {where}.{path}: got {value!r}, allowed: a mapping of fields to values")
        else:
            flat[path] = value
    return flat


def _options(source: Path, where: str, name: object) -> set[str]:
    """The model options of a family."""
    try:
        return set(registry.family(name).config.model_fields)
    except ValueError:
        given = "nothing" if name is None else repr(name)
        known = registry.families()
        raise UserError(
            f"{source}: {where}: model.family: got {given}{did_you_mean(name, known)}, allowed: {', '.join(known)}"
        ) from None


def _applies(path: str, options: set[str]) -> bool:
    section, _, rest = path.partition(".")
    return section != "model" or rest.split(".")[0] in options


def _refuse_unknown_options(source: Path, where: str, paths: list[str], used: set[str]) -> None:
    """A model option that no family of the grid has is a mistake, not something to drop."""
    known = {option for name in used for option in registry.family(name).config.model_fields}
    for path in paths:
        if not _applies(path, known):
            option = path.split(".")[1]
            raise UserError(
                f"{source}: {where}.{path}: unknown option of {', '.join(sorted(used))}{did_you_mean(option, known)}, "
                f"allowed: {', '.join(sorted(known))}"
            )


def _cell(source: Path, point: _Point, need_data: bool = True) -> Cell:
    """The validated cell, environment variables filled in and files known by their content."""
    where = f"{source}: {point.label}: " if point.label else f"{source}: "
    nested: dict[str, Any] = {}
    for path, value in point.fields.items():
        _put(nested, path, _expand(value, f"{where}{path}"), where)
    try:
        cell = Cell.model_validate(nested)
    except ValidationError as error:
        complaint = explain(error, Cell, nested)
        origin = point.origins.get(complaint.partition(": ")[0])
        raise UserError(f"{where}{f'from {origin}: ' if origin else ''}{complaint}") from None
    cell = cell.model_copy(update={"baseline": registry.family(cell.model.family).source})
    try:
        return cell.model_copy(update={"data": cell.data.identified()})
    except UserError as error:
        if not need_data:
            return cell
        raise UserError(f"{where}{error}") from None


def _put(nested: dict[str, Any], path: str, value: Any, where: str) -> None:
    *parents, last = path.split(".")
    for depth, name in enumerate(parents):
        nested = nested.setdefault(name, {})
        if not isinstance(nested, dict):
            section = ".".join(parents[: depth + 1])
            raise UserError(f"{where}{section}: got {nested!r} beside {path}, allowed: a mapping")
    nested[last] = value


def _expand(value: Any, where: str) -> Any:
    """`${NAME}` in texts from the environment, in lists too."""
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            field = where.rsplit(": ", 1)[-1]
            raise UserError(
                f"{where}: got ${{{name}}}, which is not set; allowed: set {name}, or give --set {field}=..."
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", variable, value)


def _excluded(source: Path, exclude: list[Any], cells: list[Cell]) -> list[bool]:
    """For every cell, whether no exclusion matches it; an exclusion that matches none is an error."""
    flats = [flat(cell.model_dump(mode="json")) for cell in cells]
    keep = [True] * len(cells)
    for number, entry in enumerate(exclude, start=1):
        where = f"exclude[{number}]"
        wanted = _flatten(source, where, entry)
        for path in wanted:
            paths = {known for fields in flats for known in fields}
            if path not in paths:
                raise UserError(
                    f"{source}: {where}.{path}: unknown field{did_you_mean(path, paths)}, allowed: a cell's field"
                )
        matching = [all(matches(fields, path, value) for path, value in wanted.items()) for fields in flats]
        if not any(matching):
            raise UserError(f"{source}: {where}: got {entry!r}, which matches no cell, allowed: one that matches some")
        keep = [kept and not match for kept, match in zip(keep, matching, strict=True)]
    return keep


def _refuse_duplicates(source: Path, chosen: list[tuple[Cell, _Point]]) -> None:
    first: dict[str, str] = {}
    for cell, point in chosen:
        if cell.run_name in first:
            raise UserError(
                f"{source}: duplicate cells: {first[cell.run_name]} and {point.label} are both {cell.run_name}, "
                "allowed: every cell once"
            )
        first[cell.run_name] = point.label
