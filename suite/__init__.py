"""Trains, evaluates and compares models with memory layers.

The operators are the package `kernels`, a name that Hugging Face's package of hub kernels has, too. Their submodules
differ, so both can be used in one process: operators are found through the path of whichever package has the name.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_KERNELS = "kernels"
_ROOT = Path(__file__).resolve().parents[1]
_INSTALLED = _ROOT / "next_parameter_data" / _KERNELS


def _find_operators(folder: Path) -> None:
    """Make the operators in `folder` importable as `kernels`, next to Hugging Face's package if that is installed."""
    package = sys.modules.get(_KERNELS)
    if package is None:
        try:
            package = _load(_other_package(folder) or _own_package(folder))
        except ImportError:  # the other package lacks something that it needs
            package = _load(_own_package(folder))
    if str(folder) not in package.__path__:
        package.__path__.append(str(folder))


def _other_package(folder: Path) -> ModuleSpec | None:
    """Return the package of this name outside of this project; None if there is none."""
    entries = [entry for entry in sys.path if Path(entry or ".").resolve() != folder.parent]
    spec = PathFinder.find_spec(_KERNELS, entries)
    # Another checkout of this project has the operators as well.
    is_other = spec is not None and spec.origin is not None and not Path(spec.origin).with_name("product_key").exists()
    return spec if is_other else None


def _own_package(folder: Path) -> ModuleSpec | None:
    return spec_from_file_location(_KERNELS, folder / "__init__.py", submodule_search_locations=[str(folder)])


def _load(spec: ModuleSpec | None) -> ModuleType:
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules[_KERNELS] = module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[_KERNELS]
        raise
    return package


_find_operators(_INSTALLED if _INSTALLED.is_dir() else _ROOT / _KERNELS)
