"""The registered model families and their options, for `suite baselines`."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python
from rich.table import Table

import suite.models  # noqa: F401  (registers the families)
from suite.cli.fields import type_name
from suite.models import registry


def families() -> dict[str, Any]:
    """Return every family with its options: type, default (absent for required options) and meaning."""
    return {"families": {name: {"options": _options(name)} for name in registry.families()}}


def _options(name: str) -> dict[str, dict[str, Any]]:
    options = {}
    for option, info in registry.family(name).config.model_fields.items():
        kind = getattr(info.annotation, "__name__", None) if isinstance(info.annotation, type) else None
        options[option] = {"type": kind or str(info.annotation), "meaning": info.description}
        if info.default is not PydanticUndefined:
            options[option]["default"] = info.default
    return options


def families_table() -> Table:
    """Return the families as a table; options that all of them share are listed once, at the top."""
    described = {name: family["options"] for name, family in families()["families"].items()}
    shared = set.intersection(*(set(options) for options in described.values()))
    table = Table(title="model families", title_justify="left")
    for column in ("family", "option", "type", "default", "meaning"):
        table.add_column(column)
    first = next(iter(described))
    rows = [("(all)", option, fields) for option, fields in described[first].items() if option in shared]
    for name, options in described.items():
        own = [(name, option, fields) for option, fields in options.items() if option not in shared]
        rows += own or [(name, "", {})]
    for name, option, fields in rows:
        if not fields:
            table.add_row(name, "", "", "", "")
            continue
        family = first if name == "(all)" else name
        kind = type_name(registry.family(family).config.model_fields[option].annotation)
        default = json.dumps(to_jsonable_python(fields["default"])) if "default" in fields else "(required)"
        table.add_row(name, option, kind, default, fields["meaning"] or "")
    return table
