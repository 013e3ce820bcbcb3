"""The operators are importable next to another package of the name `kernels`, as Hugging Face's is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import kernels
from kernels import dispatch, get_kernel
from kernels.layer import LAYER
from kernels.embedding_bag import embedding_bag
from suite.models import build
assert get_kernel() == LAYER == "hub"
assert dispatch.__file__.startswith(sys.argv[1]), dispatch.__file__
"""


@pytest.mark.parametrize("start", ["import suite", "import kernels, suite", "import suite.models.product_key"])
@pytest.mark.parametrize("is_first", [True, False])
def test_both_packages_work_in_one_process_in_either_order(start: str, is_first: bool, tmp_path: Path) -> None:
    if start.startswith("import kernels") and not is_first:
        pytest.skip("the operators were imported alone, before the rest of the project")
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("from kernels.layer import LAYER\n\n\ndef get_kernel():\n    return LAYER\n")
    (other / "layer.py").write_text("LAYER = 'hub'\n")
    paths = [str(other.parent), str(ROOT)] if is_first else [str(ROOT), str(other.parent)]
    program = f"import sys; sys.path[:0] = {paths!r}; {start}\n{CHECK}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", program, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_operators_alone_need_no_other_package(tmp_path: Path) -> None:
    program = "import kernels.embedding_bag, sys; assert 'suite' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
