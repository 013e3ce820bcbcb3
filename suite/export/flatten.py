"""Our modules as one flat folder of files that import each other alone: what an export carries along.

transformers copies the files that a modelling file imports by `from .name import ...` and no others, from one folder.
`a.b.c` becomes `a_b_c.py`, and its imports of our packages are rewritten accordingly.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGES = ("suite", "kernels")
ROOT = Path(__file__).resolve().parents[2]


def bundle(
    entry: str, name: str, extra: dict[str, str] | None = None, instead: dict[str, str] | None = None
) -> dict[str, str]:
    """File name -> source of module `entry` (as `name`.py) and of all modules of ours that it needs.

    `extra`: further sources by file name, whose imports are rewritten, too; `entry` is made to import them. `instead`:
    modules whose place is taken by others.
    """
    files: dict[str, str] = {}
    waiting = [(entry, name, _path(entry).read_text())]
    waiting += [("", file.removesuffix(".py"), source) for file, source in (extra or {}).items()]
    done = {entry}
    while waiting:
        _, flat, source = waiting.pop()
        files[f"{flat}.py"], needed = rewritten(source)
        for module in sorted(needed - done):
            done.add(module)
            waiting.append((module, flat_name(module), _path((instead or {}).get(module, module)).read_text()))
    others = sorted(file.removesuffix(".py") for file in files if file != f"{name}.py")
    along = "".join(f"from .{other} import __name__ as _{other}  # noqa: F401\n" for other in others)
    files[f"{name}.py"] += f"\n# Imported by name, so that they are copied along.\n{along}"
    return files


def rewritten(source: str) -> tuple[str, set[str]]:
    """A module's source with imports of ours made relative, and the modules of ours that it imports."""
    lines, needed = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] not in PACKAGES:
            continue
        made, names = [], []
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if _exists(whole):
                needed.add(whole)
                made.append(f"from . import {flat_name(whole)} as {alias.asname or alias.name}")
            else:
                names.append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
        if names:
            needed.add(node.module)
            made.append(f"from .{flat_name(node.module)} import {', '.join(names)}")
        last = node.end_lineno or node.lineno
        lines[node.lineno - 1] = " " * node.col_offset + "; ".join(made)
        lines[node.lineno : last] = [""] * (last - node.lineno)
    return "\n".join(lines) + "\n", needed


def flat_name(module: str) -> str:
    """`a.b.c` as a file's name."""
    return module.replace(".", "_")


def _exists(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _path(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if (path / "__init__.py").is_file() else path.with_suffix(".py")
