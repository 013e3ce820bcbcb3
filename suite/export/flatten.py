"""Copies the project's modules into one flat folder of files that import only each other, for an export.

transformers copies only those files that a modelling file imports as `from .name import ...`, all from one folder.
Module `a.b.c` becomes `a_b_c.py`, and its imports of the project's packages are rewritten.
"""

from __future__ import annotations

import ast
from pathlib import Path

from suite.shipped import shipped

PACKAGES = ("suite", "kernels")
ROOT = Path(__file__).resolve().parents[2]


def bundle(
    module: str, name: str, extra: dict[str, str] | None = None, replacements: dict[str, str] | None = None
) -> dict[str, str]:
    """Collect a module and every module of the project that it imports, directly or indirectly.

    Args:
        module: The module to start from.
        name: The name of its file in the bundle, without `.py`.
        extra: Further sources by file name. Their imports are rewritten too, and `module` imports them.
        replacements: Modules to copy in place of others, by the name of the module they replace.

    Returns:
        The sources by file name.
    """
    files: dict[str, str] = {}
    pending = [(name, _path(module).read_text(encoding="utf-8"))]
    pending += [(file.removesuffix(".py"), source) for file, source in (extra or {}).items()]
    queued = {module}
    while pending:
        flat, source = pending.pop()
        files[f"{flat}.py"], needed = rewritten(source)
        for other in sorted(needed - queued):
            queued.add(other)
            pending.append(
                (flat_name(other), _path((replacements or {}).get(other, other)).read_text(encoding="utf-8"))
            )
    flat_names = sorted(file.removesuffix(".py") for file in files if file != f"{name}.py")
    imports = "".join(f"from .{other} import __name__ as _{other}  # noqa: F401\n" for other in flat_names)
    files[f"{name}.py"] += f"\n# Imported by name, so that transformers copies them.\n{imports}"
    return files


def rewritten(source: str) -> tuple[str, set[str]]:
    """Return a module's source with the project's imports made relative, and the modules that those name."""
    lines, needed = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] not in PACKAGES:
            continue
        statements, names = [], []
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            if _exists(module):
                needed.add(module)
                statements.append(f"from . import {flat_name(module)} as {alias.asname or alias.name}")
            else:
                names.append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
        if names:
            needed.add(node.module)
            statements.append(f"from .{flat_name(node.module)} import {', '.join(names)}")
        last = node.end_lineno or node.lineno
        lines[node.lineno - 1] = " " * node.col_offset + "; ".join(statements)
        lines[node.lineno : last] = [""] * (last - node.lineno)
    return "\n".join(lines) + "\n", needed


def flat_name(module: str) -> str:
    """Return the file name of module `a.b.c`, without `.py`."""
    return module.replace(".", "_")


def _exists(module: str) -> bool:
    path = _root(module) / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _root(module: str) -> Path:
    """Return the folder that a module's top-level package is in."""
    return shipped("kernels").parent if module.split(".")[0] == "kernels" else ROOT


def _path(module: str) -> Path:
    path = _root(module) / Path(*module.split("."))
    return path / "__init__.py" if (path / "__init__.py").is_file() else path.with_suffix(".py")
