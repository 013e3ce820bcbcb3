"""Who may import whom (the rules between packages), read from the source and seen at run time."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kernels": {"suite", "analysis", "pandas", "pydantic"},  # numpy: only where it is there (faster sorts on CPU)
    "analysis": {"suite", "torch", "triton", "lm_eval"},
    "suite/models": {"suite.train", "suite.launch", "suite.evaluate", "suite.data", "suite.records", "datasets"},
    "suite/train": {"lm_eval", "submitit", "datasets", "suite.launch"},
    "suite": {"analysis"},
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, each with all its parents: a.b.c gives a, a.b and a.b.c."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_it_may_not(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[room] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("analysis.__main__", ["torch", "suite", "scipy", "matplotlib"]),
        ("suite.train.loop", ["lm_eval", "submitit", "datasets"]),
        ("suite.cli.main", ["torch", "lm_eval", "submitit"]),
    ],
)
def test_importing_a_module_loads_nothing_heavy_it_does_not_need(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_kernels_need_torch_alone() -> None:
    """With every other package out of reach, the PyTorch paths import and search as they do with numpy."""
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
