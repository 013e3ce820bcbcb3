"""An installed wheel works from an empty folder: it carries grids, cluster profiles and published numbers."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from suite.launch.provenance import code_version

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the wheel of this project is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source_copy(folder))]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def source_copy(folder: Path) -> Path:
    """Return a copy of the tracked files, since a build leaves its own files next to the sources."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder / "source"


def run(installed: Path, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in `folder` with the installed wheel before everything else on the path."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    start = f"import sys; sys.path.insert(0, {str(installed)!r}); "
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", start + program]
    return subprocess.run(command, cwd=empty, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_an_installed_wheel_sweeps_a_grid_by_name(installed: Path, tmp_path: Path) -> None:
    program = (
        "import suite; print(suite.__file__, file=sys.stderr); "
        "sys.argv = ['suite', 'sweep', 'smoke', '--dry-run', '--json']; "
        "from suite.cli.main import main; main()"
    )
    listed = run(installed, tmp_path, program)
    assert listed.returncode == 0, listed.stderr
    assert str(installed) in listed.stderr
    assert len(json.loads(listed.stdout)["cells"]) > 1


@pytest.mark.slow
def test_an_installed_wheel_has_its_operators_and_their_hash(installed: Path, tmp_path: Path) -> None:
    program = (
        "import suite.models, kernels.dispatch; from suite.launch.provenance import code_version; "
        "print(kernels.dispatch.__file__, code_version())"
    )
    done = run(installed, tmp_path, program)
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert file.startswith(str(installed / "next_parameter_data" / "kernels"))
    assert version == code_version()


@pytest.mark.slow
def test_an_installed_wheel_draws_the_published_numbers(installed: Path, tmp_path: Path) -> None:
    program = "import runpy; sys.argv = ['analysis', 'paper']; runpy.run_module('analysis', run_name='__main__')"
    drawn = run(installed, tmp_path, program)
    assert drawn.returncode == 0, drawn.stderr
    assert list((tmp_path / "empty").rglob("*.png"))


@pytest.mark.slow
def test_a_wheel_holds_what_it_needs_and_no_other_top_level_names(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"suite", "analysis", "next_parameter_data"}
    shipped = {name for name in names if name.startswith("next_parameter_data/")}
    expected = [*ROOT.glob("grids/*.yaml"), *ROOT.glob("clusters/*.yaml"), *ROOT.glob("results/published/*.csv")]
    assert shipped >= {f"next_parameter_data/{path.relative_to(ROOT)}" for path in expected}
    sources = {f"next_parameter_data/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*/native.c")}
    assert sources <= set(names)
    assert any(name.startswith("suite/evaluate/tasks/") and name.endswith(".yaml") for name in names)
