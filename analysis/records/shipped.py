"""Folders of the repository that an installed distribution carries as `next_parameter_data` (see setup.py)."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def shipped(folder: str) -> Path:
    """Return a folder such as `grids` or `results/published`, in the repository or as it was installed."""
    installed = _ROOT / "next_parameter_data" / folder
    return installed if installed.is_dir() else _ROOT / folder


def published_folder(results: Path) -> Path:
    """Return the folder of published numbers: that of these results, or else the one that this distribution carries."""
    own = results / "published"
    return own if own.is_dir() else shipped("results/published")
