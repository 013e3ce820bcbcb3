"""Add the missing scores to trained runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.cells import Cell, EvalConfig
from suite.errors import DiskFull, UserError
from suite.launch import background_scoring
from suite.launch.derived import quantise
from suite.launch.scorer import Scorer, cache_of, missing_evals, needs_usage
from suite.records import CELL_FACTS, Locked, RunDir
from suite.train.parallel import World

if TYPE_CHECKING:
    from suite.data.corpus import Corpus
    from suite.data.sources.registry import DataConfig
    from suite.models.transformer import Transformer

FACTS = ("few_shot", "n", "cut")
"""Fields of a task that are listed with its scores."""
READS, TASKS = "reads of tables", "tasks"
"""The parts of scoring: it counts the reads for usage.json, and scores the tasks."""
BEAT_S = 2.0
"""Seconds between records of the progress."""


def corpus_of(run: RunDir, cell: Cell) -> Corpus:
    """Return the corpus of a trained run; if its text is not available, the tokenizer that the run contains.

    Raises UserError if neither is available.
    """
    from suite.data.corpus import TokenizerAlone, prepare

    try:
        return prepare(cell.data, cache=cache_of(run))
    except UserError as error:
        if not run.tokenizer_path.exists():
            raise
        reason = f"{error}; restore the files, or name their new place in the grid, and score it: suite eval GRID"
        return TokenizerAlone(cell.data, run.tokenizer_path, str(run.read_record()["data_fingerprint"]), reason)


def refuse_unfit(run: RunDir, cell: Cell, scorer: Scorer) -> None:
    """Refuse tasks that cannot be scored.

    Args:
        run: The run; tasks that have scores are not checked.
        cell: Its cell.
        scorer: Settings for scoring.

    Raises:
        UserError: A task does not suit the cell's data, or its own data is missing.
    """
    wanted = missing_evals(run, cell)
    if not wanted:
        return
    from suite.evaluate import catalog

    for config in cell.evaluate:
        if config.hash8 in wanted:
            catalog.refuse_unfit(config.tasks, cell.data, scorer.run_code is not None)
            if scorer.data_root is not None:
                catalog.refuse_missing(config, scorer.data_root)


def refuse_too_many_examples(run: RunDir, cell: Cell, data_root: Path | None, seen: set[tuple[str, str]]) -> None:
    """Refuse evaluations with more examples than the data has, if it is at hand, before the run is trained.

    Args:
        run: The run; evaluations that have scores are not checked.
        cell: Its cell.
        data_root: The folder of evaluation data; None: the hub, whose data is not checked.
        seen: The evaluations and data that were checked, to which those of the cell are added.

    Raises:
        UserError: A task has fewer examples.
    """
    if data_root is None and cell.data.synthetic_world() is None:
        return
    wanted = missing_evals(run, cell)
    for config in cell.evaluate:
        key = config.hash8, cell.data.model_dump_json()
        if config.num_fewshot and config.hash8 in wanted and key not in seen:
            from suite.evaluate import catalog

            catalog.refuse_too_many_examples(config, cell.data, data_root)
            seen.add(key)


def needs_scoring(run: RunDir, cell: Cell) -> bool:
    """Return whether a trained run still lacks scores, of the end or of retained checkpoints, or its memory usage."""
    return bool(missing_evals(run, cell) or background_scoring.retained_steps(run)) or needs_usage(run, cell)


def score_missing(run: RunDir, cell: Cell, corpus: Corpus, scorer: Scorer, world: World | None = None) -> None:
    """Score the retained checkpoints, then the final weights, wherever scores are missing; record memory usage.

    Args:
        run: A trained run.
        cell: Its cell, with the evaluations to score.
        corpus: The cell's corpus.
        scorer: Settings for scoring.
        world: Processes that hold the model together, all of which call this; None: this process holds it.
    """
    world = world or World()
    background_scoring.score_retained(run, cell, corpus, scorer, world)
    wanted, lacks_usage = missing_evals(run, cell), needs_usage(run, cell)
    world.wait()  # every process has looked before one of them writes
    if not wanted and not lacks_usage:
        return
    import torch

    from suite.train.checkpoint import final_step

    # As in training, so that a run that was interrupted between the two gets the same scores.
    torch.set_num_threads(cell.threads)
    step = final_step(run, world)
    model = _load(run, cell, corpus, scorer, world, step)
    reference = quantise.load_source(run, cell, corpus) if cell.source is not None and wanted else None
    facts = {"run": run.name, "step": step}
    if lacks_usage:
        from suite.evaluate.usage import key_usage

        with _recording(run, READS, world) as on_progress:
            usage = key_usage(model, corpus, world.size, on_progress)
        if world.is_first:
            run.write_usage(facts | usage)
    if wanted:
        with _recording(run, TASKS, world) as on_progress:
            for number, config in enumerate(config for config in cell.evaluate if config.hash8 in wanted):
                part = partial(_in_part, on_progress, number, len(wanted))
                scores = scorer.evaluator.evaluate(model, corpus, config, reference, part)
                if world.is_first:
                    run.write_eval(config.hash8, scores | facts)
    if scorer.place is not None:
        from suite.inference.tables.reading import traffic

        print(f"{run.name}: tables in {scorer.place.label}: {traffic(model).line()}", file=sys.stderr)


def _in_part(on_progress: Callable[[float], None], number: int, parts: int, share: float) -> None:
    """Report the share of several equal parts that is done, from the share of one of them."""
    on_progress((number + share) / parts)


@contextmanager
def _recording(run: RunDir, part: str, world: World) -> Iterator[Callable[[float], None]]:
    """Yield a function that records in the run's state which share of a part of scoring is done, and the time left.

    The first process records, and shows a bar on a terminal; both end with the block.
    """
    if not world.is_first:
        yield lambda share: None
        return
    from suite.train.reporting.telemetry import progress_bar

    started = time.monotonic()
    due = started
    bar = progress_bar(in_percent=True)
    task = None if bar is None else bar.add_task(f"{run.name}: {part}", total=1.0, note="")

    def on_progress(share: float) -> None:
        nonlocal due
        if bar is not None and task is not None:
            bar.update(task, completed=share)
        now = time.monotonic()
        if now >= due or share == 1.0:
            due = now + BEAT_S
            run.beat_scoring(part, share, (now - started) * (1 - share) / share if share else None)

    with bar or nullcontext():
        on_progress(0.0)
        try:
            yield on_progress
        finally:
            run.beat_scoring(None)


def _load(run: RunDir, cell: Cell, corpus: Corpus, scorer: Scorer, world: World, step: int | None) -> Transformer:
    """Load the model to score, with its tables and their cache where the scorer's settings request them."""
    from suite.train.checkpoint import load_model

    place = scorer.place if cell.model.has_tables else None
    model = load_model(run, cell, corpus, world, step, place)
    if place is not None:
        from suite.inference.tables import loading, popularity

        counts = popularity.counts(model, popularity.training_text(corpus)) if place.policy == "static" else None
        loading.add_caches(model, place, counts)
    return model


def evaluate_run(run_path: Path, added: tuple[EvalConfig, ...], scorer: Scorer, data: DataConfig | None = None) -> Cell:
    """Add the missing scores to a trained run.

    Args:
        run_path: The run directory.
        added: Evaluations to score and to record in addition to those of the run's cell.
        scorer: Settings for scoring.
        data: The `data` block of the run's cell in a grid, which may name files that were moved; None: the run's.

    Returns:
        The cell as recorded, with the added evaluations.

    Raises:
        UserError: The run is not trained, or is locked by another process.
    """
    run = RunDir(run_path)
    try:
        with run.lock():
            if not run.state().get("trained"):
                raise UserError(f"{run.path}: is not trained to its end; continue it with suite sweep or suite train")
            recorded = run.read_cell()
            cell = recorded.with_evaluations(added)
            scored = cell if data is None else cell.model_copy(update={"data": data})
            score_missing(run, scored, corpus_of(run, scored), scorer)
            if cell != recorded:
                # Recorded after scoring: an evaluation that fails is not left for the next sweep to try again.
                facts = {name: value for name, value in run.read_record().items() if name not in CELL_FACTS}
                run.write_cell(cell, **facts)
            set_done(run)
            return cell
    except Locked:
        raise UserError(f"{run.path}: is locked by another process; wait for it or stop it") from None


def set_done(run: RunDir) -> None:
    """Record that the run is trained and scored."""
    run.set_state("done", progress=1.0, eta_s=0.0, scoring=None, finished=time.time())


def score_runs(
    runs: Iterable[tuple[RunDir, Cell]], scorer: Scorer, log: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """Add the missing scores to every trained run; requests are prepared once for all of them.

    Scores that were written before a failure or a KeyboardInterrupt stay.

    Args:
        runs: Runs, each with its cell: where its data is, and evaluations to add to those that it has.
        scorer: Settings for scoring.
        log: Called with a line before each run, and with the cause for one that cannot be scored.

    Returns:
        The names of the runs that are not trained, and of those that cannot be scored.

    Raises:
        UserError: No run is trained, or none of those that are can be scored.
        DiskFull: There is no space for scores.
    """
    requested = [*runs]
    trained = [(run, cell) for run, cell in requested if run.state().get("trained")]
    if not trained:
        raise UserError(f"{requested[0][0].path}: is not trained to its end; continue it with suite train")
    for run, cell in trained:
        refuse_unfit(run, run.read_cell().with_evaluations(cell.evaluate), scorer)
    unscored: list[str] = []
    for number, (run, cell) in enumerate(trained, start=1):
        log(f"scoring {run.name} ({number} of {len(trained)})")
        try:
            evaluate_run(run.path, cell.evaluate, scorer, cell.data)
        except DiskFull:
            raise
        except UserError as error:
            unscored.append(run.name)
            if len(unscored) == len(trained):
                raise
            log(f"suite: not scored: {error}")
    return [run.name for run, _ in requested if not run.state().get("trained")], unscored


def scores_of(run: RunDir, configs: Iterable[EvalConfig]) -> list[dict[str, Any]]:
    """Return the scores that a run has of evaluations, one row per metric of each task; members of a group separately.

    Returns:
        [{"eval", "task", "table_off", "precision", "few_shot", "n", "cut", "metric", "value", "stderr"}]; "eval" is the
        evaluation's hash.
    """
    rows = []
    for config in dict.fromkeys(configs):
        if run.has_eval(config.hash8):
            tasks = run.read_eval(run.eval_path(config.hash8))["tasks"]
            for name in config.tasks:
                facts = {"eval": config.hash8, "task": name, "table_off": config.table_off}
                facts["precision"] = config.precision
                facts |= {key: tasks[name][key] for key in FACTS}
                rows += [{**facts, "metric": metric, **score} for metric, score in tasks[name]["metrics"].items()]
    return rows


def of_other_data(run: RunDir, configs: Iterable[EvalConfig], data_root: Path) -> list[str]:
    """Return one line for each evaluation whose scores were made from other data than `data_root` holds now.

    Args:
        run: The run.
        configs: Evaluations; those without scores are skipped.
        data_root: The folder of evaluation data.
    """
    from suite.evaluate import catalog

    lines = []
    for config in dict.fromkeys(configs):
        path = run.eval_path(config.hash8)
        if path.exists():
            tasks = run.read_eval(path)["tasks"]
            now = catalog.fingerprints(config, data_root)
            changed = [name for name, fingerprint in now.items() if tasks[name]["data_fingerprint"] != fingerprint]
            if changed:
                lines.append(
                    f"{path}: {', '.join(changed)}: scored on other data than {data_root} holds; "
                    "to score again, delete that file"
                )
    return lines
