"""Builds the requested tasks as lm-eval tasks over the available data.

`dataset_path` in a task's YAML file selects its documents: `corpus` stands for documents made from the model's training
data; any other data set is read by `datasets.DataRoot`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask

from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.data.sources.registry import DataConfig
from suite.errors import UserError
from suite.evaluate import corpus_docs, task_list
from suite.evaluate.datasets import DataRoot, Docs
from suite.evaluate.lm_eval_patches import quiet
from suite.evaluate.sandbox import Sandbox
from suite.evaluate.schemas import check
from suite.evaluate.task_list import CORPUS
from suite.evaluate.tasks import code

FEWSHOT_SEED = 1234
"""lm-eval's default, so that stock prompts with examples are the stock ones."""


def refuse_unfit(tasks: Iterable[str], data: DataConfig, run_code: bool = False) -> None:
    """Check, possibly before training, that tasks suit a run.

    Args:
        tasks: Names of tasks.
        data: The `data` block of the run.
        run_code: Whether programs may run.

    Raises:
        UserError: A task is unknown, does not suit the data, or runs programs when none may run.
    """
    for name in tasks:
        definition = task_list.entry(name)
        if definition.programs is not None and not run_code:
            raise code.needs_sandbox(name)
        if definition.is_about_corpus:
            corpus_docs.refuse_unfit(data, name, definition.configs()[0]["dataset_name"])
        elif data.tokenizer.kind == "word":
            raise UserError(
                f"task {name}: data.tokenizer.kind: got 'word', which has only the words of its own world, "
                "allowed: bpe, bytes, file"
            )


@dataclass
class Loaded:
    """Tasks ready for `lm_eval.evaluator.evaluate`, and the fingerprints of their data.

    `tasks`: by name, the subjects of a group included; `groups`: lm-eval's groups by name; `fingerprints`: of
    the data, by task.
    """

    tasks: dict[str, ConfigurableTask] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """The inputs of tasks.

    `corpus`: the model's training data, None for tasks that read only files; `root`: where the files are; `sandbox`:
    where programs that the model writes run, None to refuse such tasks.
    """

    corpus: Corpus | None
    root: DataRoot
    sandbox: Sandbox | None = None


def load(names: Iterable[str], sources: Sources, num_fewshot: int | None = None) -> Loaded:
    """Build tasks by name.

    Args:
        names: Names of `task_list.names()`.
        sources: Their inputs.
        num_fewshot: Few-shot examples; None: the task's own number, or 0. A task that states 0 always has 0.

    Raises:
        UserError: An unknown name, a task that does not fit the corpus, or data that cannot be used.
    """
    loaded = Loaded()
    for name in names:
        definition = task_list.entry(name)
        configs = definition.configs()
        if definition.programs is not None:
            (stock,) = configs
            configs = [code.configure(name, stock, definition.programs, sources.root, sources.sandbox)]
        members = [_add(loaded, config, sources, num_fewshot) for config in configs]
        if (stated := definition.group_config()) is not None:
            # Means are weighted by questions, so that the stock sub-groups make no difference.
            group = Group.from_config({key: stated[key] for key in ("group", "aggregate_metric_list", "metadata")})
            for task in members:
                group.add(task)
            loaded.groups[name] = group
    return loaded


def _add(loaded: Loaded, config: dict[str, Any], sources: Sources, num_fewshot: int | None) -> ConfigurableTask:
    config = _with_examples(config, num_fewshot)
    docs, fingerprint = _documents(config, sources)
    task = _task(config, docs)
    loaded.tasks[config["task"]], loaded.fingerprints[config["task"]] = task, fingerprint
    return task


def _task(config: dict[str, Any], docs: dict[str, Docs]) -> ConfigurableTask:
    """Build a task over the documents of its splits. Raises UserError if it wants more examples than they have."""
    config = dict(config)
    process = config.pop("process_docs", None)
    if process is not None:
        # once, instead of on every access of lm-eval to the documents
        docs = {split: process(rows) for split, rows in docs.items()}
    # lm-eval passes the metadata and the arguments of the data set to the loader
    config |= {"custom_dataset": _giving(docs), "dataset_kwargs": {}}
    task = ConfigurableTask(config=config)
    _refuse_too_many_examples(task)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def _with_examples(config: dict[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """Return the configuration with this number of examples, without the splits that are then unused."""
    stated = config.get("num_fewshot")
    # A stock task that states 0 (humaneval) never has examples, nor has the scoring of whole documents.
    fixed = stated == 0 or config["output_type"] == "loglikelihood_rolling"
    shots = (stated or 0) if num_fewshot is None or fixed else num_fewshot
    if shots:
        others = ("training_split", "validation_split", "fewshot_split", "fewshot_config")
        # lm-eval excludes the question from its own examples only if the configuration names their split
        same = {} if any(config.get(key) for key in others) else {"fewshot_split": config["test_split"]}
        return config | {"num_fewshot": shots} | same
    # TriviaQA has 138,000 examples
    unused = ["training_split", "fewshot_split", *(["validation_split"] if config.get("test_split") else [])]
    return config | {"num_fewshot": 0, **dict.fromkeys(unused)}


def _refuse_too_many_examples(task: ConfigurableTask) -> None:
    shots = task.config.num_fewshot
    if not shots:
        return
    docs = task.fewshot_docs()
    # Excluded are all documents about the person in question (`OtherPeople`), or the question itself, for which
    # lm-eval draws one example more.
    of_one_person = Counter(doc["person"] for doc in docs if "person" in doc)
    left_out = max(of_one_person.values(), default=int(task.fewshot_cfg.split == task.config.test_split))
    most = len(docs) - left_out
    if shots > most:
        raise UserError(
            f"task {task.config.task}: num_fewshot: got {shots}, allowed: at most {most}, the number in its data"
        )


def refuse_too_many_examples(config: EvalConfig, data: DataConfig, root: Path | None) -> None:
    """Check before training that tasks have the examples that `num_fewshot` requests, where their data is at hand.

    It is where the documents are made from an invented world, and where the files are in a local folder.

    Args:
        config: The evaluation.
        data: The `data` block of the run.
        root: The folder of evaluation data; None: the hub, which is not queried.

    Raises:
        UserError: A task has fewer examples.
    """
    world = data.synthetic_world()
    with quiet():
        for definition in map(task_list.entry, config.tasks if config.num_fewshot else ()):
            for stated in definition.configs() if definition.programs is None else ():
                used = _with_examples(stated, config.num_fewshot)
                if not used["num_fewshot"]:
                    continue
                if definition.is_about_corpus:
                    if world is not None:
                        _task(used, {"test": corpus_docs.of_world(world, used["dataset_name"])})
                elif root is not None:
                    _task(used, DataRoot(root).load(used["dataset_path"], used.get("dataset_name"), _splits(used)))


def _giving(docs: dict[str, Docs]) -> Callable[..., dict[str, Docs]]:
    return lambda **_: docs


def _documents(config: dict[str, Any], sources: Sources) -> tuple[dict[str, Docs], str]:
    """Return the splits a task needs and the fingerprint of what they were made from."""
    repo, name = config["dataset_path"], config.get("dataset_name")
    if repo == CORPUS:
        corpus = sources.corpus
        if corpus is None:
            raise UserError(f"task {config['task']}: needs the corpus that a run was trained on; evaluate a run")
        return {"test": corpus_docs.documents(corpus, config["task"], config["dataset_name"])}, corpus.fingerprint
    splits = _splits(config)
    docs = sources.root.load(repo, name, splits)
    for split in splits:
        check(repo, docs[split], sources.root.where(repo, name, split))
    return docs, sources.root.fingerprint(repo, name, splits)


def _splits(config: dict[str, Any]) -> list[str]:
    """Return all splits that a configuration names."""
    splits = [config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    return list(dict.fromkeys(split for split in splits if split is not None))


def files_of(name: str) -> list[tuple[str, str | None, str]]:
    """Return (repository, configuration, split) of all files that a task may read, few-shot examples included."""
    return _files(name, num_fewshot=1)


def without_data(names: Iterable[str], root: Path) -> list[str]:
    """Return the tasks that read a file that `root` lacks, without few-shot examples unless the task has its own."""
    data = DataRoot(root)
    return [name for name in names if not all(data.has(*file) for file in _files(name, num_fewshot=None))]


def _files(name: str, num_fewshot: int | None) -> list[tuple[str, str | None, str]]:
    """Return (repository, configuration, split) of all files that a task reads with this number of examples."""
    reads = list(_reads(EvalConfig(tasks=(name,), num_fewshot=num_fewshot)))
    programs = task_list.entry(name).programs
    own = [code.EXAMPLE_SPLIT] if programs is not None and programs.problems.examples else []
    return [(repo, config, split) for _, repo, config, splits in reads for split in [*splits, *own]]


def refuse_missing(config: EvalConfig, root: Path) -> None:
    """Raise UserError for a task whose files are not in `root`; may be called before training."""
    data = DataRoot(root)
    for _, repo, name, splits in _reads(config):
        for split in splits:
            data.files(repo, name, split)


def fingerprints(config: EvalConfig, root: Path) -> dict[str, str]:
    """Return current fingerprints of the evaluation's data in `root`, by task or subject. Raises UserError."""
    data = DataRoot(root)
    return {task: data.fingerprint(repo, name, splits) for task, repo, name, splits in _reads(config)}


def _reads(config: EvalConfig) -> Iterator[tuple[str, str, str | None, list[str]]]:
    """Yield (task, repository, configuration, splits) that the tasks read from files."""
    for name in config.tasks:
        definition = task_list.entry(name)
        for stated in definition.configs():
            if stated["dataset_path"] != CORPUS:
                used = _with_examples(stated, config.num_fewshot)
                task = used["task"] if definition.programs is None else name
                yield task, used["dataset_path"], used.get("dataset_name"), _splits(used)


def prompt_hash(task: ConfigurableTask) -> str:
    """Return a hash of every request the task makes: prompts, examples, choices, generation options, in order."""
    return digest(_request_texts(task))


def _request_texts(task: ConfigurableTask) -> Iterator[str]:
    previous = None
    for request in task.instances:
        first, *rest = request.args
        # choices share their context, which is long, so it is hashed once
        yield first if first is not previous else ""
        yield json.dumps([request.request_type, rest], sort_keys=True)
        previous = first


def digest(parts: Iterable[str]) -> str:
    """Return 16 hex digits of texts in order."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() + b"\0")
    return hashed.hexdigest()[:16]
