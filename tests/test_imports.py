"""Which module may import which, read from the source of every module and tried at run time."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "kernels": ("native", "dispatch", "embedding_bag", "product_key row_adamw rotary", "bench"),
    "suite": (
        "errors",
        "atomic identity shipped",
        "models data",
        "yaml_input trainable",
        "cells",
        "baselines contrast",
        "blocks",
        "parents",
        "grids",
        "rescale records inference",
        "train evaluate",
        "plan housekeeping",
        "launch",
        "bench export",
        "cli",
        "__main__",
    ),
    "analysis": ("errors", "records laws", "fits", "comparisons studies", "figures", "report paper", "cli", "__main__"),
}
"""The packages and modules of each top-level package, from the lowest to the highest layer.

A module imports from lower layers and from its own package, never from a higher layer or from another package of its
own layer. `suite` stands above `kernels`; `analysis` imports neither.
"""
FORBIDDEN = {
    "kernels": {"suite", "analysis", "pandas", "pydantic"},  # numpy is optional: it sorts faster on a CPU
    "analysis": {"suite", "torch", "triton", "lm_eval"},
    "suite/models": {"suite.train", "suite.launch", "suite.evaluate", "suite.data", "suite.records", "datasets"},
    "suite/train": {"lm_eval", "submitit", "datasets", "suite.launch", "suite.evaluate"},
    "suite": {"analysis"},
}
MAX_MODULES = 14
MAX_MODULES_OF = {"suite/models": 21}
"""The families are of one kind, so their folder may hold more."""


def module_files() -> dict[str, Path]:
    """Return the file of every module of the three packages, by dotted name."""
    files = {}
    for package in LAYERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


def imported_names(path: Path) -> list[tuple[str, str]]:
    """Return every import of a file, within functions and under TYPE_CHECKING too, as (module, name); the name is empty
    for `import module`."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            imports += [(node.module, alias.name) for alias in node.names]
    return imports


def graph() -> dict[str, set[str]]:
    """Return module -> the modules of this project that it imports."""
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = {full if (full := f"{source}.{name}") in MODULES else source for source, name in imported_names(path)}
        edges[module] = {name for name in names if name in MODULES and name != module}
    return edges


def layer(module: str) -> int:
    """Return the number of a module's layer within its top-level package; that of the package itself is 0."""
    package, _, rest = module.partition(".")
    if not rest:
        return 0
    unit = rest.split(".")[0]
    levels = [level for level, names in enumerate(LAYERS[package]) if unit in names.split()]
    assert levels, f"{module}: {unit} has no layer; add it to LAYERS"
    return levels[0]


def unit(module: str) -> str:
    """Return the package or module that has a layer: the first two parts of the name."""
    return ".".join(module.split(".")[:2])


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_imports_from_a_higher_layer() -> None:
    wrong = {
        f"{module} -> {name}"
        for module, names in graph().items()
        for name in names
        if module.split(".")[0] == name.split(".")[0] and unit(module) != unit(name) and layer(name) >= layer(module)
    }
    assert wrong == set()


def test_every_module_of_analysis_is_in_a_subpackage() -> None:
    top = {path.name for path in (ROOT / "analysis").glob("*.py")}
    assert top <= {"__init__.py", "__main__.py", "errors.py"}


def test_no_folder_holds_many_modules() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in MODULES.values() if not path.name.startswith("__"))
    assert {folder: n for folder, n in counts.items() if n > MAX_MODULES_OF.get(folder, MAX_MODULES)} == {}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_package_imports_nothing_forbidden(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {}
    for path in files:
        names = {f"{source}.{name}".rstrip(".") for source, name in imported_names(path)}
        bad = {name for name in names for rule in FORBIDDEN[folder] if f"{name}.".startswith(f"{rule}.")}
        if bad:
            wrong[str(path.relative_to(ROOT))] = bad
    assert wrong == {}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("analysis.cli.main", ["torch", "suite", "scipy", "matplotlib"]),
        ("suite.train.loop", ["lm_eval", "submitit", "datasets"]),
        ("suite.cli.main", ["torch", "lm_eval", "submitit"]),
    ],
)
def test_importing_a_module_loads_no_heavy_package_needlessly(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_kernels_need_torch_alone() -> None:
    """Without any other package, the PyTorch paths import and give the same result as with numpy."""
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'numpy', 'pydantic', 'scipy', 'pandas'}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from kernels.product_key import product_key
from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.row_adamw import RowAdamW
torch.manual_seed(0)
rows, _ = product_key(torch.randn(5, 2, 2, 4), torch.randn(2, 2, 200, 4), 7, backend="torch")
print(rows.sum().item())
"""
    answers = []
    for text in (program, program.replace("sys.meta_path.insert(0, Absent())", "")):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1]
