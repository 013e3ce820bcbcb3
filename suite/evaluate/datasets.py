"""Evaluation data from a local folder in the hub's layout, or from the hub.

`<root>/<org>/<name>/<config>/<split>.jsonl` (or .parquet, sharded as the hub does). Files are read as they are, every
time: nothing is cached, so nothing can be stale. (`datasets.load_dataset` on a local folder keys its cache by the
folder's name alone and has been seen to serve another folder's rows.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite.errors import UserError

Doc = dict[str, Any]


class Docs(list[Doc]):
    """Rows with the two things lm-eval asks of a data set: `features` and `map`."""

    @property
    def features(self) -> Doc:
        """The fields, by name."""
        return dict.fromkeys(self[0]) if self else {}

    def map(self, function: Callable[[Doc], Doc]) -> Docs:
        """Each row updated by what `function` gives for it."""
        return Docs({**row, **function(row)} for row in self)


class DataRoot:
    """Where evaluation data comes from: a local folder, or the hub where `path` is None."""

    def __init__(self, path: Path | None) -> None:
        if path is not None and not path.is_dir():
            raise UserError(
                f"--data-root: got {str(path)!r}, allowed: a folder with <org>/<name>/<config>/<split>.jsonl"
            )
        self.path = path

    def load(self, repo: str, config: str | None, splits: Iterable[str]) -> dict[str, Docs]:
        """The named splits of a data set.

        Raises:
            UserError: a file is missing, cut short, or holds something else than one object a row.
        """
        return {split: self.split(repo, config, split) for split in splits}

    def split(self, repo: str, config: str | None, split: str) -> Docs:
        """One split, as `load`."""
        if self.path is None:
            return _from_hub(repo, config, split)
        return _read(self.files(repo, config, split))

    def files(self, repo: str, config: str | None, split: str) -> list[Path]:
        """The local files of one split, in order."""
        assert self.path is not None
        folder = self._folder(repo, config)
        files = [
            path
            for suffix in ("jsonl", "parquet")
            for path in [*folder.glob(f"{split}.{suffix}"), *sorted(folder.glob(f"{split}-*.{suffix}"))]
        ]
        if not files:
            wanted = (folder / f"{split}.jsonl").relative_to(self.path)
            raise UserError(f"{self.path}: no {wanted} (nor .parquet); get it with: suite data prefetch {self.path}")
        return files

    def where(self, repo: str, config: str | None, split: str) -> str:
        """A split's place in words: its file, its shards, or its name on the hub."""
        if self.path is None:
            return f"{repo} ({split})"
        first, *others = self.files(repo, config, split)
        return str(first.with_name(f"{split}-*{first.suffix}") if others else first)

    def _folder(self, repo: str, config: str | None) -> Path:
        """The folder of a configuration; unnamed, it is the only one there is, or `default`."""
        assert self.path is not None
        folder = self.path / repo
        if config is not None:
            return folder / config
        found = sorted(path for path in folder.glob("*") if path.is_dir())
        return found[0] if len(found) == 1 else folder / "default"

    def fingerprint(self, repo: str, config: str | None, splits: Iterable[str]) -> str:
        """What identifies the data: a hash of the files' content, or the hub's revision."""
        if self.path is None:
            return _hub_revision(repo)
        digest = hashlib.sha256()
        for split in sorted(set(splits)):
            for path in self.files(repo, config, split):
                digest.update(f"{split}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return f"sha256:{digest.hexdigest()[:16]}"


def _read(files: list[Path]) -> Docs:
    """All rows of a split's files."""
    docs = Docs()
    for path in files:
        docs.extend(_read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path))
    if not docs:
        raise UserError(f"{files[0]}: got no rows, allowed: one JSON object a line")
    return docs


def _read_jsonl(path: Path) -> list[Doc]:
    rows: list[Doc] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(
                f"{path}:{number}: not whole JSON (a download cut short?), allowed: one object a line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: got {type(row).__name__}, allowed: one JSON object a line")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Doc]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not whole parquet ({str(error).splitlines()[0]})") from None


def _from_hub(repo: str, config: str | None, split: str) -> Docs:
    import datasets

    try:
        return Docs(datasets.load_dataset(repo, config, split=split).to_list())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repo} ({config or 'default'}, {split}): not from the hub ({reason}), allowed: a network, or --data-root "
            "with its files (`suite data prefetch` makes them where there is one)"
        ) from None


def _hub_revision(repo: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return f"hub:{HfApi().dataset_info(repo).sha}"
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return "hub:cached"
