"""What scoring a run needs, and which of its scores are missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from suite.cells import Cell, EvalConfig
from suite.records import DamagedRecord, RunDir

if TYPE_CHECKING:
    from suite.data.corpus import Corpus
    from suite.evaluate.harness import Evaluator
    from suite.evaluate.sandbox import RunCode
    from suite.inference.tables.loading import Place


@dataclass
class Scorer:
    """Settings for scoring: the folder of data sets (None: the hub), the sandbox for programs that models write (None:
    they are refused), and where value tables are (None: in the model).

    The evaluator is built on first use, so that requests are prepared once for any number of runs.
    """

    data_root: Path | None = None
    run_code: RunCode | None = None
    place: Place | None = None

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator with these settings. Raises UserError if the data or the sandbox is not available."""
        # Importing lm-eval takes longer than training a small cell.
        from suite.evaluate.harness import Evaluator
        from suite.evaluate.sandbox import sandbox_of

        return Evaluator(self.data_root, sandbox_of(self.run_code))

    def refuse_lost_parts(self, cell: Cell, corpus: Corpus) -> None:
        """Check before training that the tokenizer can encode the texts of the cell's evaluations. Raises UserError."""
        from suite.evaluate.harness import Harness
        from suite.evaluate.sandbox import sandbox_of

        for config in cell.evaluate:
            # not by the evaluator, which would keep the requests in memory during training
            Harness(corpus, config, self.data_root, sandbox_of(self.run_code))


def cache_of(run: RunDir) -> Path:
    """Return the folder of prepared corpora, shared by all runs of a results folder."""
    return run.path.parent.parent / "cache"


def missing_evals(run: RunDir, cell: Cell) -> list[str]:
    """Return the hashes of the cell's evaluations that have no scores yet.

    An evaluation of one grid may have been scored in parts, for grids that share some of its tasks.
    """
    missing = [config for config in cell.evaluate if not run.has_eval(config.hash8)]
    if not missing or not run.cell_path.exists():
        return [config.hash8 for config in missing]
    recorded = (EvalConfig.model_validate(fields) for fields in run.read_record()["cell"].get("evaluate", ()))
    scored = [config for config in recorded if run.has_eval(config.hash8)]
    return [config.hash8 for config in missing if not _is_covered(config, scored)]


def _is_covered(config: EvalConfig, scored: Iterable[EvalConfig]) -> bool:
    """Return whether every task of an evaluation has scores with the same settings."""
    tasks = {task for other in scored if other.settings == config.settings for task in other.tasks}
    return tasks.issuperset(config.tasks)


def needs_usage(run: RunDir, cell: Cell) -> bool:
    """Return whether the model has a memory whose usage is not recorded yet."""
    return cell.model.has_tables and not run.usage_path.exists()


def is_finished(run: RunDir, cell: Cell) -> bool:
    """Return whether the run has failed, has damaged records, or is done with every configured score."""
    try:
        state = run.read_all().state["state"]
    except DamagedRecord:
        return True
    return state == "failed" or (state == "done" and not missing_evals(run, cell))
