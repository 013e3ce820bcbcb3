"""Which changes of the code make runs stale."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from suite.launch.provenance import ROOT, bare_c, bare_python, code_version, versions, weight_sources

PYTHON = '''
"""A module."""
def double(x):  # twice
    """Twice x."""
    return 2 * x
'''
C = """
#define LARGEST(a, b) ((a) > (b) ? (a) : (b))
// A comment.
static int add(int a, int b) {
    return a + +b; /* not a ++b */
}
static const char *text = "a // b";
"""

MAKES_WEIGHTS = [
    "suite/cells.py",
    "suite/models/transformer.py",
    "suite/models/product_key.py",
    "suite/data/loader.py",
    "suite/data/bios/text.py",
    "suite/train/loop.py",
    "suite/train/optim.py",
    "suite/train/probe.py",
    "suite/inference/loglikelihood.py",
    "kernels/dispatch.py",
    "kernels/native.py",
    "kernels/row_adamw/reference.py",
    "kernels/product_key/triton.py",
    "kernels/row_adamw/native.c",
    "kernels/product_key/native.c",
    "kernels/embedding_bag/native.c",
]
MAKES_NO_WEIGHTS = [
    "suite/models/dropin.py",
    "suite/inference/generation.py",
    "suite/train/reporting/loggers.py",
    "suite/plan/plan.py",
    "suite/bench/training.py",
    "suite/launch/worker.py",
    "suite/evaluate/harness.py",
    "suite/cli/main.py",
    "suite/errors.py",
    "kernels/bench/cases.py",
]

IMPORTED_BY_TRAINING_WITHOUT_MAKING_WEIGHTS = {
    "suite/inference/tables/loading.py",  # loads trained models
    "suite/__init__.py",
    "suite/errors.py",
    "suite/atomic.py",
    "suite/records.py",
    "suite/baselines/__init__.py",
    "suite/baselines/loading.py",
    "suite/baselines/checks.py",
    "suite/identity.py",
    "suite/inference/__init__.py",
    "suite/train/reporting/loggers.py",
    "suite/train/reporting/telemetry.py",
}
"""Errors, records, logs, and the loading of external baselines, whose source is part of a cell's hash."""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources."""
    folder = tmp_path_factory.mktemp("sources")
    for package in ("suite", "kernels"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def version_with(copied: Path, name: str, text: str) -> str:
    """The code's version with another text of one file."""
    path = copied / name
    original = path.read_text()
    path.write_text(text)
    try:
        return code_version.__wrapped__(copied)
    finally:
        path.write_text(original)


def with_a_changed_byte(path: Path) -> str:
    """The text with one character changed outside of comments and docstrings."""
    text = path.read_text()
    if path.suffix == ".c":
        place = next(re.finditer(r'^ +\w[^*/\n"]*;$', text, re.MULTILINE)).end() - 1
        changed = text[:place] + "," + text[place + 1 :]
    else:
        node = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
        lines = text.splitlines(keepends=True)
        row = node.lineno - 1
        place = lines[row].index(node.name)
        lines[row] = lines[row][:place] + "Q" + lines[row][place + 1 :]
        changed = "".join(lines)
    assert len(changed) == len(text)
    assert changed != text
    return changed


def test_a_copy_of_the_sources_has_the_same_version(copied: Path) -> None:
    assert code_version(copied) == code_version()


@pytest.mark.parametrize("name", MAKES_WEIGHTS)
def test_a_changed_byte_of_a_weight_source_makes_runs_stale(copied: Path, name: str) -> None:
    assert version_with(copied, name, with_a_changed_byte(copied / name)) != code_version()


@pytest.mark.parametrize("name", MAKES_NO_WEIGHTS)
def test_a_changed_byte_of_another_source_does_not_make_runs_stale(copied: Path, name: str) -> None:
    assert version_with(copied, name, with_a_changed_byte(copied / name)) == code_version()


@pytest.mark.parametrize("name", ["suite/train/loop.py", "kernels/row_adamw/native.c"])
def test_a_changed_comment_does_not_make_runs_stale(copied: Path, name: str) -> None:
    comment = "\n// the end\n\n" if name.endswith(".c") else "\n# the end\n\n"
    assert version_with(copied, name, (copied / name).read_text() + comment) == code_version()


def test_every_file_that_training_imports_makes_weights_or_is_listed_as_harmless() -> None:
    covered = {path.relative_to(ROOT).as_posix() for path in weight_sources(ROOT)}
    assert imported_files("suite/train/loop.py") - covered == set()


def imported_files(start: str) -> set[str]:
    """The files of this project that a file imports, directly or through others that may make weights."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name in IMPORTED_BY_TRAINING_WITHOUT_MAKING_WEIGHTS:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for module in modules:
                path = module.replace(".", "/")
                waiting += [file for file in (f"{path}.py", f"{path}/__init__.py") if (ROOT / file).is_file()]
    return seen


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        (PYTHON.replace("# twice", "# two times"), True),
        (PYTHON.replace('"""Twice x."""', '"""Two\n    times."""'), True),
        (PYTHON.replace("return 2 * x", "return (2\n            * x)"), True),
        (PYTHON.replace("2 * x", "3 * x"), False),
        (PYTHON.replace("double", "treble"), False),
        (PYTHON.replace("return 2 * x", "return '2 * x'"), False),
    ],
)
def test_python_comments_docstrings_and_layout_are_not_code(changed: str, is_same: bool) -> None:
    assert (bare_python(changed) == bare_python(PYTHON)) == is_same


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        (C.replace("// A comment.", "/* Another\n one. */"), True),
        (C.replace("a + +b", "a\n    +  +b"), True),
        (C.replace("int a, int b", "int a,int b"), True),
        (C.replace("(a, b) ((a)", "(a, b) \\\n    ((a)"), True),
        (C.replace("a + +b", "a ++b"), False),
        (C.replace("LARGEST(a", "LARGEST (a"), False),
        (C.replace("a // b", "a /  b"), False),
        (C.replace("int a", "long a"), False),
    ],
)
def test_c_comments_and_layout_are_not_code(changed: str, is_same: bool) -> None:
    assert (bare_c(changed) == bare_c(C)) == is_same


def test_versions_name_the_code_and_torch() -> None:
    assert versions()["code"] == code_version()
    assert len(code_version()) == 12
    assert "torch" in versions()
