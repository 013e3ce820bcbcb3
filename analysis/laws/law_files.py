"""Law files: a formula with its parameters and source as YAML, to be shared and cited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from analysis.errors import InputError
from analysis.laws.formula import formula_law
from analysis.laws.law import Law

FIELDS = ("name", "formula", "source", "residuals", "parameters", "meaning")


def read_law(path: Path, columns: Sequence[str]) -> Law:
    """Return the law of a .yaml file: `formula`, and optionally name, source, residuals, parameters and meaning.

    Args:
        path: The file.
        columns: Names of the columns; other names in the formula are parameters.

    Raises:
        InputError: The file cannot be read, or a field is wrong.
    """
    try:
        # BaseLoader: every value is the text that the user wrote (YAML 1.1 reads `1e9` as text and `no` as false)
        content: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--law {path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "formula" not in content:
        raise InputError(f"--law {path}: formula is missing")
    unknown = [key for key in content if key not in FIELDS]
    if unknown:
        raise InputError(f"--law {path}: got field {unknown[0]!r}, allowed: {', '.join(FIELDS)}")
    for key in ("parameters", "meaning"):
        if not isinstance(content.get(key, {}), dict):
            raise InputError(f"--law {path}: {key}: got text, allowed: a mapping of names to text")
    residuals = content.get("residuals", "log")
    if residuals not in ("log", "linear"):
        raise InputError(f"--law {path}: residuals: got {residuals!r}, allowed: log, linear")
    return formula_law(
        content["formula"],
        columns,
        content.get("parameters", {}),
        name=content.get("name", path.stem),
        source=content.get("source", path.name),
        residuals=residuals,
        meaning=content.get("meaning", {}),
        option=f"--law {path}: formula",
    )
