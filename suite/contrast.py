"""The primary contrast of a grid: which two variants are compared, and on what, declared before any run.

    contrast:
      treatment: {model.family: memory_plus, model.half_keys: 128}
      reference: {model.family: dense, model.ffn_hidden: null}
      metric: e50                   # or eval/nll, or TASK/METRIC of an evaluation
      base: w32                     # optional: short for model.base on both sides
      over: data.people             # optional: one contrast over all values of a field

Each side is a partial match of the grid's cells, as in `exclude`, and must select one variant: cells that differ only
in their seed. The two sides are paired by seed. With `over`, each side must select one variant for every value of that
field, with the same base and data on both sides; other settings, such as tuned rates, may differ between values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suite.cells import Cell, flat
from suite.errors import UserError
from suite.yaml_input import did_you_mean, shown

FIELDS = ("treatment", "reference", "metric", "base", "over")
SIDES = ("treatment", "reference")
E50_AVERAGED = "e50_averaged"
"""E50 of the average of the weights (train.probe_average)."""
FORGETTING = "forgetting"
"""What is forgotten at equal learning of new facts: each side is a method, with all of its settings."""
OUTSIDE_A_VARIANT = ("seed", "evaluate", "threads", "train.parent")
"""Fields in which the runs of one side of a contrast may differ; each seed may have a parent of its own."""


@dataclass(frozen=True)
class Contrast:
    """The metric, the names of the runs on each side, and the field over whose values it is taken (None: one)."""

    metric: str
    treatment: tuple[str, ...]
    reference: tuple[str, ...]
    over: str | None = None

    def renamed(self, names: Mapping[str, str]) -> Contrast:
        """Return the same contrast after its runs changed their names."""
        treatment, reference = (tuple(names[run] for run in side) for side in (self.treatment, self.reference))
        return Contrast(self.metric, treatment, reference, self.over)

    def document(self) -> dict[str, Any]:
        """Return the contrast as grid.json records it."""
        return asdict(self)


def select(source: Path, content: object, cells: Sequence[Cell]) -> Contrast:
    """Return the contrast that a grid's `contrast` section declares.

    Args:
        source: The grid's file, for messages.
        content: The section as read from YAML.
        cells: The cells of the grid.

    Raises:
        UserError: An unknown or missing field, a side that selects no cell or several variants, two sides without a
            shared seed or with other values of `over`, or a metric that these cells do not record.
    """
    where = f"{source}: contrast"
    if not isinstance(content, dict):
        raise UserError(f"{where}: got {shown(content)}, allowed: a mapping with {', '.join(FIELDS)}")
    for field in content:
        if field not in FIELDS:
            raise UserError(
                f"{where}.{field}: unknown field{did_you_mean(str(field), FIELDS)}, allowed: {', '.join(FIELDS)}"
            )
    for field in (*SIDES, "metric"):
        if field not in content:
            raise UserError(f"{where}.{field}: missing, allowed: treatment, reference and metric are needed")
    settings = [flat(cell.model_dump(mode="json")) for cell in cells]
    paths = {path for fields in settings for path in fields}
    shared = {"model.base": content["base"]} if "base" in content else {}
    may_differ = ("train",) if content["metric"] == FORGETTING else ()
    over = _over(f"{where}.over", content.get("over"), paths)
    sides = {}
    for side in SIDES:
        wanted = _wanted(f"{where}.{side}", content[side], shared, paths)
        sides[side] = _side(f"{where}.{side}", wanted, cells, settings, over, may_differ)
    treatment, reference = sides["treatment"], sides["reference"]
    if {cell.run_name for cell in treatment} & {cell.run_name for cell in reference}:
        raise UserError(f"{where}: treatment and reference select the same cells; name a field in which they differ")
    _refuse_unpaired(where, over, treatment, reference)
    _check_metric(f"{where}.metric", content["metric"], [*treatment, *reference])
    ours, theirs = (tuple(cell.run_name for cell in side) for side in (treatment, reference))
    return Contrast(str(content["metric"]), ours, theirs, over)


def matches(settings: Mapping[str, Any], path: str, value: Any) -> bool:
    """Return whether a cell's dotted settings have this value at this path, or one of a list of values.

    Args:
        settings: The cell's settings by dotted path.
        path: The dotted path.
        value: The value, or a list of values.
    """
    return path in settings and (settings[path] == value or (isinstance(value, list) and settings[path] in value))


def _wanted(where: str, content: object, shared: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Return the dotted settings that select one side; all must be among `paths`, the fields of the cells."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where}: got {shown(content)}, allowed: a mapping of cell fields to values")
    wanted = {**shared, **flat(content)}
    for path in wanted:
        if path not in paths:
            raise UserError(f"{where}.{path}: unknown field{did_you_mean(path, paths)}, allowed: a cell's field")
    return wanted


def _side(
    where: str,
    wanted: Mapping[str, Any],
    cells: Sequence[Cell],
    settings: list[dict[str, Any]],
    over: str | None = None,
    may_differ: tuple[str, ...] = (),
) -> list[Cell]:
    """Return the cells of one side, all of one variant (for each value of `over`) but for the sections in
    `may_differ`."""
    chosen = [
        (cell, fields)
        for cell, fields in zip(cells, settings, strict=True)
        if all(matches(fields, path, value) for path, value in wanted.items())
    ]
    if not chosen:
        raise UserError(f"{where}: got {wanted!r}, which selects no cell, allowed: values that some cells have")
    firsts: dict[str, dict[str, Any]] = {}
    for _, fields in chosen:
        first = firsts.setdefault(_value(fields, over), fields)
        for path in sorted(first.keys() | fields.keys()):
            if not {path, path.split(".")[0]} & {*OUTSIDE_A_VARIANT, *may_differ} and first.get(path) != fields.get(
                path
            ):
                raise UserError(f"{where}: selects cells that differ in {path}; name one value of it")
    return [cell for cell, _ in chosen]


def _over(where: str, over: object, paths: Collection[str]) -> str | None:
    """Return the field over whose values the contrast is taken. Raises UserError if no cell has it."""
    if over is not None and over not in paths:
        hint = did_you_mean(str(over), paths)
        raise UserError(f"{where}: got {over!r}, unknown field{hint}, allowed: a cell's field, such as data.people")
    return None if over is None else str(over)


def _value(fields: Mapping[str, Any], over: str | None) -> str:
    """Return a cell's value of `over` as text."""
    return "" if over is None else str(fields.get(over))


def _refuse_unpaired(where: str, over: str | None, treatment: Sequence[Cell], reference: Sequence[Cell]) -> None:
    """Raise UserError unless the two sides have, for each value of `over`, a shared seed, base and data."""
    parts = [_by_value(over, side) for side in (treatment, reference)]
    for value in sorted(parts[0].keys() ^ parts[1].keys()):
        side = SIDES[value not in parts[0]]
        raise UserError(f"{where}.over: {over}: only the {side} has {value}; allowed: the same values on both sides")
    for value, cells in parts[0].items():
        others, at = parts[1][value], "" if over is None else f" at {over} {value}"
        if not {cell.seed for cell in cells} & {cell.seed for cell in others}:
            raise UserError(f"{where}: treatment and reference share no seed{at}; runs are paired by seed")
        if over is not None and (cells[0].model.base, cells[0].data) != (others[0].model.base, others[0].data):
            raise UserError(f"{where}.over: treatment and reference differ in model.base or data{at}")


def _by_value(over: str | None, side: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of one side by their value of `over`."""
    parts: dict[str, list[Cell]] = {}
    for cell in side:
        parts.setdefault(_value(flat(cell.model_dump(mode="json")), over), []).append(cell)
    return parts


def _check_metric(where: str, metric: object, cells: Sequence[Cell]) -> None:
    """Refuse a metric that the cells of the contrast cannot have."""
    ordinary = [[config for config in cell.evaluate if not config.table_off] for cell in cells]
    tasks = set.intersection(*({task for config in configs for task in config.tasks} for configs in ordinary))
    probed = all(cell.data.kind == "bios" and cell.train.probes for cell in cells)
    task, _, name = str(metric).partition("/")
    taught = all(cell.train.probe_every is not None for cell in cells)
    averaged = probed and all(cell.train.probe_average is not None for cell in cells)
    special = [*(["e50"] if probed else []), *([E50_AVERAGED] if averaged else []), *([FORGETTING] if taught else [])]
    if metric in (*special, "eval/nll") or (name and task in tasks):
        return
    allowed = [*special, "eval/nll", *(f"{task}/METRIC" for task in sorted(tasks))]
    raise UserError(f"{where}: got {metric!r}, allowed: {', '.join(allowed)}")
