"""Runs with smaller tables: made from a trained run, not trained, and scored next to it.

The cell of such a run is that of its source with `quantised` or `kept_rows` set, so the name of either run follows from
the other.

Shapes: R rows of a table, K rows that are retained, D row width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from suite.cells import Cell
from suite.data.corpus import Corpus
from suite.data.loader import Batch
from suite.errors import UserError
from suite.models.transformer import Transformer
from suite.records import RunDir

COUNTED_TOKENS = 1 << 17
"""Tokens of training text whose reads choose the rows that are retained."""


def source_of(run: RunDir, cell: Cell) -> RunDir:
    """Return the trained run, in the same folder, from which a run with smaller tables is made. Raises UserError."""
    assert cell.source is not None, "the cell is trained"
    source = RunDir(run.path.with_name(cell.source.run_name))
    if source.damage() is not None or not source.state().get("trained"):
        raise UserError(f"{source.path}: is not trained to its end, and {run.name} is made from it; train it first")
    return source


def load_source(run: RunDir, cell: Cell, corpus: Corpus) -> Transformer:
    """Return the model of the trained run from which a run with smaller tables is made.

    Args:
        run: The run with smaller tables.
        cell: Its cell.
        corpus: Its corpus.

    Raises:
        UserError: The source is not trained, or its last checkpoint is damaged or missing.
    """
    from suite.train.checkpoint import final_step, load_model

    assert cell.source is not None, "the cell is trained"
    source = source_of(run, cell)
    return load_model(source, cell.source, corpus, step=final_step(source))


def make(run: RunDir, cell: Cell, corpus: Corpus) -> None:
    """Write the records and the checkpoint of a run with smaller tables, whose lock is held.

    cell.json has the account with rows in their form, `started_from`, as for other runs with a parent, and `tables`:
    the bytes of the tables of both, and their losses in evaluation mode with the paired standard error of the
    difference. train.jsonl has one line, the probe of the new model at the step of its source. Versions are those of
    the code that trained the weights.

    Args:
        run: The run to make.
        cell: Its cell.
        corpus: Its corpus.

    Raises:
        UserError: The source is not trained, or its last checkpoint is damaged or missing.
    """
    from suite.inference.tables.costs import account_of_cell
    from suite.inference.tables.reading import reduce_tables, stored_rows
    from suite.models.accounting import meta_model
    from suite.train import checkpoint
    from suite.train.checkpoint import load_model
    from suite.train.parallel import World
    from suite.train.probe import Prober

    assert cell.source is not None, "the cell is trained"
    source = source_of(run, cell)
    step = checkpoint.final_step(source)
    model = load_model(source, cell.source, corpus, step=step)
    assert step is not None, "load_model refuses a run without a checkpoint"
    before = sum(table.weight.numel() * table.weight.element_size() for table in model.memory_tables())
    prober = Prober(corpus)
    losses = [_losses(model, prober.rows)]
    kept, counted = (None, {}) if cell.kept_rows is None else _most_read(model, corpus, cell.kept_rows, prober.rows)
    reduce_tables(model, cell.quantised, kept)
    losses.append(_losses(model, prober.rows))
    record = source.read_record()
    fields = ("versions", "data_fingerprint", "tokenizer")
    started = {"run": source.name, "hash": cell.source.hash8, "step": step, "fresh": [], "unused": []}
    started["code"] = record.get("versions", {}).get("code")
    after = sum(rows.bytes for rows in stored_rows(model))
    tables = {"form": cell.quantised, "bytes": after, "source_bytes": before, "loss": _compared(*losses), **counted}
    facts = {name: record[name] for name in fields if name in record}
    facts["account"] = account_of_cell(cell, meta_model(cell.model, corpus.vocab_size)).to_json()
    run.write_cell(cell, **facts, started_from=started, tables=tables)
    last = source.last_train_line()
    line = {name: last[name] for name in ("step", "tokens", "epoch", "train_flops", "wall_s") if name in last}
    run.train_path.unlink(missing_ok=True)
    run.append_train(line | prober.run(model))
    position = json.loads((source.checkpoints / f"step-{step}" / checkpoint.POSITION_FILE).read_text(encoding="utf-8"))
    world = World()
    checkpoint.save(run, step, {"model": model.state_dict()}, position, keep=1, world=world)
    run.set_state("running", trained=True)


def _most_read(
    model: Transformer, corpus: Corpus, share: float, scored: Batch
) -> tuple[list[Tensor], dict[str, float]]:
    """Choose the rows of each table that are retained, by counts of the reads of training text.

    The text starts after the rows of the loss, which are training text for `bios`.

    Args:
        model: The trained model.
        corpus: Its corpus.
        share: The share of rows that is retained.
        scored: The rows of the loss.

    Returns:
        The numbers of the rows of each table, ascending, [K] each; and {"kept_rows", "counted_tokens"} for the record.
    """
    from suite.inference.tables import popularity
    from suite.inference.tables.stores import rows_of_share

    first = -(-len(scored.tokens_BT) // popularity.BATCH_ROWS)
    batches = max(1, COUNTED_TOKENS // (popularity.BATCH_ROWS * corpus.config.seq_len))
    counts = popularity.counts(model, popularity.training_text(corpus, first, batches))
    kept = [popularity.most_read(counts_R, rows_of_share(share, len(counts_R))).sort().values for counts_R in counts]
    tokens = batches * popularity.BATCH_ROWS * corpus.config.seq_len
    return kept, {"kept_rows": share, "counted_tokens": tokens}


def _losses(model: Transformer, rows: Batch) -> tuple[list[float], list[int]]:
    """Return the mean loss of each row that has targets, and their number."""
    from suite.data.packing import IGNORED
    from suite.train.probe import loss

    parts = zip(rows.tokens_BT.split(1), rows.targets_BT.split(1), rows.segments_BT.split(1), strict=True)
    batches = [Batch(*part) for part in parts]
    counts = [int((batch.targets_BT != IGNORED).sum()) for batch in batches]
    return [loss(model, batch) for batch, count in zip(batches, counts, strict=True) if count], [*filter(None, counts)]


def _compared(source: tuple[list[float], list[int]], smaller: tuple[list[float], list[int]]) -> dict[str, Any]:
    """Return the losses of the source and of the new model, and their paired difference over rows."""
    from suite.inference.paired import differences

    before, after = ([(value * count, count) for value, count in zip(*part, strict=True)] for part in (source, smaller))
    ours, others = ([{"doc": None, "loss": item} for item in items] for items in (after, before))
    return {"value": _mean_loss(after), **differences(ours, others, {"loss": _mean_loss})["loss"]}


def _mean_loss(items: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in items) / sum(count for _, count in items)


def summary(run: RunDir, cell: Cell) -> dict[str, Any]:
    """Return what a run with smaller tables costs and what it changes, from its records.

    Returns:
        {"run", "source", "form", "bytes", "source_bytes", "loss": {"value", "reference", "difference", "stderr"},
        "tasks": {task: {metric: {"reference", "difference", "stderr"}}}}, and "kept_rows" and "counted_tokens" if rows
        were dropped.
    """
    record = run.read_record()
    tables = record["tables"]
    tasks: dict[str, Any] = {}
    for config in cell.evaluate:
        path = run.eval_path(config.hash8)
        if path.exists():
            scored = run.read_eval(path)["tasks"]
            name = " (table off)" if config.table_off else ""
            name += "" if config.precision == "fp32" else f" ({config.precision})"
            tasks |= {f"{task}{name}": scores.get("differences", {}) for task, scores in scored.items()}
    return {"run": run.name, "source": record["started_from"]["run"], **tables, "tasks": tasks}
