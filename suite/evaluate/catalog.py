"""Every task by name, made into lm-eval tasks over the data at hand.

A task is a YAML file: ours in tasks/, the stock ones where lm-eval keeps them. `dataset_path` says where
documents come from: those of `corpus` are made from what the model was trained on, anything else is read by
`data.DataRoot`. lm-eval's own index of 14,000 tasks is never built (it takes 6 to 11 seconds).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.data.sources.registry import DataConfig
from suite.errors import UserError
from suite.evaluate import corpus_docs
from suite.evaluate.datasets import DataRoot, Docs
from suite.evaluate.sandbox import Sandbox
from suite.evaluate.schemas import check
from suite.evaluate.tasks import code
from suite.yaml_input import did_you_mean

OURS = Path(__file__).parent / "tasks"
STOCK = Path(lm_eval.tasks.__file__).parent
STOCK_TASKS = {
    "nq_open": "nq_open/nq_open.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
FEWSHOT_SEED = 1234
"""lm-eval's own default, so that stock prompts with examples are the stock ones."""


def names(corpus: bool = True, run_code: bool = True) -> list[str]:
    """Every task that can be asked for; without those about a corpus, or those that run code, if so asked."""
    ours = [path.stem for path in OURS.glob("*.yaml") if not path.stem.startswith("_")]
    if not corpus:
        ours = [name for name in ours if load_yaml(OURS / f"{name}.yaml")["dataset_path"] != "corpus"]
    return sorted([*ours, *STOCK_TASKS, "mmlu", *(code.TASKS if run_code else ())])


def refuse_unfit(tasks: Iterable[str], data: DataConfig, run_code: bool = False) -> None:
    """Raise UserError for a task that a run on this data cannot be asked; may be called before training."""
    known = names()
    for name in tasks:
        if name not in known:
            raise UserError(f"evaluate.tasks: got {name!r}{did_you_mean(name, known)}, allowed: {', '.join(known)}")
        if name in code.TASKS and not run_code:
            raise UserError(f"task {name}: runs programs that the model writes, allowed: with --run-code only")
        config = load_yaml(path) if (path := OURS / f"{name}.yaml").is_file() else {}
        if config.get("dataset_path") == "corpus":
            corpus_docs.refuse_unfit(data, name, config["dataset_name"])
        elif data.tokenizer.kind == "word":
            raise UserError(
                f"task {name}: data.tokenizer.kind: got 'word', which knows its own world's words alone, "
                "allowed: bpe, bytes"
            )


@dataclass
class Loaded:
    """Tasks ready for `lm_eval.evaluator.evaluate`, and what their data is.

    `tasks`: by name, the subjects of a group included; `groups`: lm-eval's groups by name; `fingerprints`: of
    the data, by task.
    """

    tasks: dict[str, ConfigurableTask] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """What tasks are made from.

    `corpus`: what the model was trained on, None for tasks that read files only; `root`: where the files are;
    `sandbox`: where programs that the model writes may run, None: nowhere.
    """

    corpus: Corpus | None
    root: DataRoot
    sandbox: Sandbox | None = None


def load(wanted: Iterable[str], sources: Sources, num_fewshot: int | None = None) -> Loaded:
    """Make the tasks of those names.

    Args:
        wanted: names of `names()`.
        sources: what they are made from.
        num_fewshot: examples before each question; None: as the task says, else none. A task that states 0 keeps it.

    Raises:
        UserError: an unknown name, a task that does not fit the corpus, or data that cannot be used.
    """
    loaded = Loaded()
    for name in wanted:
        if name == "mmlu":
            _load_mmlu(loaded, sources, num_fewshot)
        else:
            _add(loaded, _config(name, sources), sources, num_fewshot)
    return loaded


def _config(name: str, sources: Sources) -> dict[str, Any]:
    if name in code.TASKS:
        return code.config(name, STOCK, sources.root, sources.sandbox)
    if name in STOCK_TASKS:
        return load_yaml(STOCK / STOCK_TASKS[name])
    path = OURS / f"{name}.yaml"
    if name.startswith("_") or not path.is_file():
        raise UserError(f"evaluate.tasks: got {name!r}{did_you_mean(name, names())}, allowed: {', '.join(names())}")
    return load_yaml(path)


def _load_mmlu(loaded: Loaded, sources: Sources, num_fewshot: int | None) -> None:
    """The 57 subjects, and the group over them weighted by questions: stock's four sub-groups change nothing."""
    stock = load_yaml(STOCK / "mmlu/default/_mmlu.yaml")
    group = Group.from_config({key: stock[key] for key in ("group", "aggregate_metric_list", "metadata")})
    for path in _mmlu_files():
        group.add(_add(loaded, load_yaml(path), sources, num_fewshot))
    loaded.groups["mmlu"] = group


def _add(loaded: Loaded, config: dict[str, Any], sources: Sources, num_fewshot: int | None) -> ConfigurableTask:
    name = config["task"]
    config = _with_examples(config, num_fewshot)
    docs, fingerprint = _documents(config, sources)
    process = config.pop("process_docs", None)
    if process is not None:
        # once, not whenever lm-eval looks at the documents
        docs = {split: process(rows) for split, rows in docs.items()}
    # lm-eval hands the metadata and the dataset's arguments to the loader
    config |= {"custom_dataset": _giving(docs), "dataset_kwargs": {}}
    task = ConfigurableTask(config=config)
    _refuse_too_many_examples(task)
    task.set_fewshot_seed(FEWSHOT_SEED)
    loaded.tasks[name], loaded.fingerprints[name] = task, fingerprint
    return task


def _with_examples(config: dict[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """The configuration with so many examples, and without splits that are not used then."""
    stated = config.get("num_fewshot")
    # a stock task that states 0 means it (humaneval)
    shots = (stated or 0) if num_fewshot is None or stated == 0 else num_fewshot
    if shots:
        return config | {"num_fewshot": shots}
    # TriviaQA has 138,000 examples
    unused = ["training_split", "fewshot_split", *(["validation_split"] if config.get("test_split") else [])]
    return config | {"num_fewshot": 0, **dict.fromkeys(unused)}


def _refuse_too_many_examples(task: ConfigurableTask) -> None:
    shots = task.config.num_fewshot
    if not shots:
        return
    # lm-eval's rule for leaving a question out of its own examples, which takes one more to draw from
    leaves_out = task.fewshot_cfg.split == task.config.test_split
    most = len(task.fewshot_docs()) - leaves_out
    if shots > most:
        raise UserError(f"task {task.config.task}: num_fewshot: got {shots}, allowed: at most {most}, all its data has")


def _giving(docs: dict[str, Docs]) -> Callable[..., dict[str, Docs]]:
    return lambda **_: docs


def _documents(config: dict[str, Any], sources: Sources) -> tuple[dict[str, Docs], str]:
    """The splits a task needs and the fingerprint of what they were made from."""
    repo, name = config["dataset_path"], config.get("dataset_name")
    if repo == "corpus":
        corpus = sources.corpus
        if corpus is None:
            raise UserError(f"task {config['task']}: asks about the corpus a run was trained on, and there is none")
        return {"test": corpus_docs.documents(corpus, config["task"], config["dataset_name"])}, corpus.fingerprint
    splits = _splits(config)
    docs = sources.root.load(repo, name, splits)
    for split in splits:
        check(repo, docs[split], sources.root.where(repo, name, split))
    return docs, sources.root.fingerprint(repo, name, splits)


def _splits(config: dict[str, Any]) -> list[str]:
    """Every split that a configuration names."""
    splits = [config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    return list(dict.fromkeys(split for split in splits if split is not None))


def files_of(name: str) -> list[tuple[str, str | None, str]]:
    """(repository, configuration, split) of everything a task that reads files may read, examples included."""
    found = [(c["dataset_path"], c.get("dataset_name"), split) for c in _stated(name) for split in _splits(c)]
    return [*found, *((repo, config, "prompt") for repo, config, _ in found[:1] if name.startswith("mbpp"))]


def refuse_missing(config: EvalConfig, root: Path) -> None:
    """Raise UserError for a task whose files are not in `root`; may be called before training."""
    have = DataRoot(root)
    for _, repo, name, splits in _reads(config):
        for split in splits:
            have.files(repo, name, split)


def fingerprints(config: EvalConfig, root: Path) -> dict[str, str]:
    """Of the data in `root` as the evaluation's tasks read it now, the subjects of a group each. Raises UserError."""
    have = DataRoot(root)
    return {task: have.fingerprint(repo, name, splits) for task, repo, name, splits in _reads(config)}


def _reads(config: EvalConfig) -> Iterator[tuple[str, str, str | None, list[str]]]:
    """(task, repository, configuration, splits) of what the tasks that read files are made from."""
    for name in config.tasks:
        for stated in _stated(name):
            if stated["dataset_path"] != "corpus":
                asked = _with_examples(stated, config.num_fewshot)
                task = name if name in code.TASKS else asked["task"]
                yield task, asked["dataset_path"], asked.get("dataset_name"), _splits(asked)


def _stated(name: str) -> list[dict[str, Any]]:
    """What the task's files say, one for each subject of mmlu."""
    if name in code.TASKS:
        return [load_yaml(STOCK / code.TASKS[name][0], resolve_func=False)]
    if name == "mmlu":
        return [load_yaml(path) for path in _mmlu_files()]
    return [load_yaml(STOCK / STOCK_TASKS[name] if name in STOCK_TASKS else OURS / f"{name}.yaml")]


def _mmlu_files() -> list[Path]:
    return sorted((STOCK / "mmlu/default").glob("mmlu_*.yaml"))


def prompt_hash(task: ConfigurableTask) -> str:
    """A hash of every request the task makes: prompts, examples, choices, generation options, in order."""
    return digest(_request_texts(task))


def _request_texts(task: ConfigurableTask) -> Iterator[str]:
    previous = None
    for request in task.instances:
        first, *rest = request.args
        # choices share their context, and it is long
        yield first if first is not previous else ""
        yield json.dumps([request.request_type, rest], sort_keys=True)
        previous = first


def digest(parts: Iterable[str]) -> str:
    """16 hex digits of texts in order."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() + b"\0")
    return hashed.hexdigest()[:16]
