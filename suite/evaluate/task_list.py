"""The list of all tasks that can be requested.

A task of this project is a YAML file in tasks/ and needs no entry here. A stock task is an entry in `STOCK_TASKS`: the
YAML file of lm-eval, or the files of a group. A new data set also gets a row type in schemas.py. lm-eval's index of
14,000 tasks is not built, because that takes 6 to 11 seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suite.errors import UserError
from suite.evaluate.tasks.code import HUMANEVAL, MBPP, Programs
from suite.yaml_input import did_you_mean


def _stock_folder() -> Path:
    """Find lm-eval without its import, which takes several seconds."""
    found = find_spec("lm_eval")
    assert found is not None, "lm-eval is a dependency of this package"
    assert found.origin is not None, "lm-eval is a package with an __init__.py"
    return Path(found.origin).with_name("tasks")


def _load_yaml(path: Path, resolve_func: bool = True) -> dict[str, Any]:
    from suite.evaluate.lm_eval_patches import load_yaml

    return load_yaml(path, resolve_func=resolve_func)


OURS = Path(__file__).parent / "tasks"
STOCK = _stock_folder()
"""lm-eval's folder of tasks."""
CORPUS = "corpus"
"""`dataset_path` of tasks whose documents come from the model's training data."""


@dataclass(frozen=True)
class Entry:
    """A task.

    files: a glob of its lm-eval tasks' YAML files; several are the members of a group.
    group: the YAML file of the group, for a group.
    programs: how it runs programs that the model writes, if it does.
    """

    folder: Path
    files: str
    group: str | None = None
    programs: Programs | None = None

    def paths(self) -> list[Path]:
        """Return the YAML file of each lm-eval task."""
        return sorted(self.folder.glob(self.files))

    def configs(self) -> list[dict[str, Any]]:
        """Return the contents of the YAML file of each lm-eval task."""
        # The modules that stock code tasks name load a metric from the hub on import.
        return [_load_yaml(path, resolve_func=self.programs is None) for path in self.paths()]

    def group_config(self) -> dict[str, Any] | None:
        """Return the contents of the YAML file of the group; None for a single task."""
        return None if self.group is None else _load_yaml(self.folder / self.group)

    @property
    def is_about_corpus(self) -> bool:
        """Whether the documents come from the model's training data."""
        return bool(_load_yaml(self.paths()[0], resolve_func=False)["dataset_path"] == CORPUS)


def _ours() -> Iterator[tuple[str, Entry]]:
    for path in OURS.glob("*.yaml"):
        if not path.stem.startswith("_"):
            yield path.stem, Entry(OURS, path.name)


STOCK_TASKS: dict[str, Entry] = {
    "nq_open": Entry(STOCK, "nq_open/nq_open.yaml"),
    "triviaqa": Entry(STOCK, "triviaqa/default.yaml"),
    "hellaswag": Entry(STOCK, "hellaswag/hellaswag.yaml"),
    "piqa": Entry(STOCK, "piqa/piqa.yaml"),
    "openbookqa": Entry(STOCK, "openbookqa/openbookqa.yaml"),
    "arc_easy": Entry(STOCK, "arc/arc_easy.yaml"),
    "arc_challenge": Entry(STOCK, "arc/arc_challenge.yaml"),
    "winogrande": Entry(STOCK, "winogrande/default.yaml"),
    "lambada_openai": Entry(STOCK, "lambada/lambada_openai.yaml"),
    "wikitext": Entry(STOCK, "wikitext/wikitext.yaml"),
    "mmlu": Entry(STOCK, "mmlu/default/mmlu_*.yaml", group="mmlu/default/_mmlu.yaml"),
    "humaneval": Entry(STOCK, "humaneval/humaneval.yaml", programs=Programs(HUMANEVAL, 1)),
    "humaneval_10": Entry(STOCK, "humaneval/humaneval.yaml", programs=Programs(HUMANEVAL, 10)),
    "mbpp": Entry(STOCK, "mbpp/mbpp.yaml", programs=Programs(MBPP, 1)),
    "mbpp_10": Entry(STOCK, "mbpp/mbpp.yaml", programs=Programs(MBPP, 10)),
}
TASKS: dict[str, Entry] = dict(sorted([*_ours(), *STOCK_TASKS.items()]))


def entry(name: str) -> Entry:
    """Return the entry of a task. Raises UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(f"evaluate.tasks: got {name!r}{did_you_mean(name, TASKS)}, allowed: {', '.join(TASKS)}")
    return TASKS[name]


def names(corpus: bool = True, run_code: bool = True) -> list[str]:
    """Return the names of tasks, sorted.

    Args:
        corpus: Include tasks about the model's training data.
        run_code: Include tasks that run programs.
    """
    return [
        name
        for name, task in TASKS.items()
        if (corpus or not task.is_about_corpus) and (run_code or task.programs is None)
    ]
