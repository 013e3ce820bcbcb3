"""Downloads all files that tasks read, in the layout of the hub, for machines without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from suite.atomic import write_text
from suite.errors import UserError
from suite.evaluate import catalog, task_list
from suite.evaluate.datasets import DataRoot, Docs

Download = Callable[[str, str | None, str], Docs]
"""(repository, configuration, split) -> rows"""


def prefetch(root: Path, tasks: Iterable[str] | None = None, download: Download | None = None) -> list[Path]:
    """Download the files of tasks that are missing in `root`.

    Args:
        root: The folder for --data-root; created if it does not exist.
        tasks: Names; None: every task that reads files.
        download: Returns the rows of a split; None: from the hub.

    Returns:
        The files written; each is complete or absent.

    Raises:
        UserError: A task is unknown or reads no files, or its data cannot be downloaded.
    """
    root.mkdir(parents=True, exist_ok=True)
    local = DataRoot(root)
    written: list[Path] = []
    for repo, config, split in _needed(tasks):
        if not local.has(repo, config, split):
            rows = (download or DataRoot(None).split)(repo, config, split)
            path = root / repo / (config or "default") / f"{split}.jsonl"
            write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
            written.append(path)
    return written


def _needed(tasks: Iterable[str] | None) -> list[tuple[str, str | None, str]]:
    """Return the distinct (repository, configuration, split) that the tasks may read, examples included."""
    available = task_list.names(corpus=False)
    needed: dict[tuple[str, str | None, str], None] = {}
    for name in available if tasks is None else tasks:
        if name not in available:
            raise UserError(f"prefetch: got {name!r}, allowed: {', '.join(available)}")
        needed |= dict.fromkeys(catalog.files_of(name))
    return list(needed)
