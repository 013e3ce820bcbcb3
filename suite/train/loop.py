"""The training loop of one cell, in one or several processes. Runs resume from any checkpoint, bit for bit on one CPU.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suite import models
from suite.cells import Cell, TrainConfig
from suite.data.corpus import Corpus
from suite.data.loader import Loader
from suite.errors import UserError
from suite.models.accounting import account
from suite.models.transformer import Transformer
from suite.models.usage import Reads
from suite.records import RunDir
from suite.train import checkpoint
from suite.train.averaging import WeightAverage
from suite.train.batches import Batches
from suite.train.compiling import compile_for_training
from suite.train.finetuning import parent
from suite.train.finetuning.knowledge import KnowledgeProber
from suite.train.finetuning.scope import Scope
from suite.train.optim import Optimizer
from suite.train.parallel import World, recompute_blocks
from suite.train.probe import Prober
from suite.train.reporting.loggers import open_loggers
from suite.train.reporting.telemetry import Telemetry
from suite.train.schedules import branch_steps, lr_factor, steps_of
from suite.train.tables.host import move_all_but_tables

FIRST_PROBE = 1 / 16
"""Position of the first probe as a fraction of all steps; the others are log-spaced from there to the last step."""

Outcome = Literal["done", "interrupted"]


class Diverged(Exception):
    """The loss is NaN or infinite; the message gives the step and the value."""


def total_steps(config: TrainConfig, loader: Loader, seq_len: int) -> int:
    """Compute the optimizer steps of a cell: its budget of tokens or epochs over the batch size.

    Args:
        config: The training configuration.
        loader: The loader of the cell's data, for the rows of an epoch.
        seq_len: Tokens per row.

    Returns:
        The number of steps, at least one.
    """
    if config.tokens is not None:
        return steps_of(config, config.tokens, seq_len)
    assert config.epochs is not None
    return max(1, round(config.epochs * loader.rows_per_epoch / config.batch_rows))


def probe_steps(config: TrainConfig, steps: int) -> set[int]:
    """Return the steps after which probes run: log-spaced, the last step included."""
    if config.probes == 0:
        return set()
    spaced = np.geomspace(max(1.0, steps * FIRST_PROBE), steps, config.probes)
    return {int(step) for step in np.round(spaced)}


@dataclass
class _Taken:
    """A step: this process's losses and the norms, on the device until read; then `losses` of all processes."""

    step: int
    parts: dict[str, Tensor]
    norms: dict[str, float | Tensor]
    lrs: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)


class Trainer:
    """A cell in training: model, optimizer and position. Every method ends between two optimizer steps.

    With several processes, each has a Trainer, and all of them call the same methods in the same order.
    """

    def __init__(self, cell: Cell, corpus: Corpus, run: RunDir, world: World | None = None) -> None:
        torch.set_num_threads(cell.threads)
        self.cell, self.config, self.corpus, self.run = cell, cell.train, corpus, run
        self.world = world or World()
        self.world.check(cell)
        self.device = self.world.device
        self.start = None
        if cell.train.parent is not None and not checkpoint.steps_saved(run):  # a resumed run has its own weights
            self.start = parent.match(run, cell, corpus)
        self.model, self.hidden = self._build()
        self.scope = self._scope()
        self.optimizer = Optimizer(self.model, self.config, self.scope.choice)
        share = self.config.probe_average
        self.average = None if share is None else WeightAverage(self.model, self.optimizer, share)
        self.reads = Reads(self.model)
        self.loader = corpus.loader(cell.seed, self.config.batch_rows)
        self.batches = Batches(self.loader, self.world, self.world.micro_batches(cell))
        self._taken: _Taken | None = None
        self.steps = total_steps(self.config, self.loader, cell.data.seq_len)
        self.probes = probe_steps(self.config, self.steps)
        self.branches = branch_steps(self.config, cell.data.seq_len)
        self.prober = Prober(corpus)
        self.knowledge = self._knowledge()
        self.flops_per_token = account(cell.model, corpus.vocab_size, cell.data.seq_len).flops_per_token
        self.step, self.train_s, self.finished, self.past = 0, 0.0, False, False
        self._restore()
        self.loggers = open_loggers(run, cell, self.step) if self.world.is_first else []

    def _build(self) -> tuple[Transformer, Any]:
        """Return the model, and its `hidden` as training calls it: the loss needs no whole logits."""
        cell, world = self.cell, self.world
        sizes = cell.model, self.corpus.vocab_size, cell.seed
        if world.distributed:
            # Imported here because it takes almost two seconds and one process does not need it.
            from suite.train.sharding import build_sharded

            precision, ids = self.config.precision, self.corpus.canonical_ids
            model = build_sharded(*sizes, world, precision, ids, self._fresh())
        else:
            in_host_memory = self.config.table_device == "host"
            built_on = torch.device("cpu") if in_host_memory else self.device
            model = models.build(*sizes, self.corpus.canonical_ids, self._fresh(), built_on)
            if in_host_memory:
                move_all_but_tables(model, self.device)
        if world.parallel.checkpoint_activations:
            recompute_blocks(model)
        if self.config.compile:
            return model, compile_for_training(model, world.distributed)
        return model, model.hidden

    def _fresh(self) -> Collection[str] | None:
        """Return the names of the parameters that no checkpoint of the run or of its parent holds; None: all."""
        if checkpoint.steps_saved(self.run):
            return ()
        return None if self.start is None else self.start.fresh

    def _scope(self) -> Scope:
        """Copy the weights of the parent, if there is one, and return what is trained.

        It precedes the optimizers, which copy or convert tables.
        """
        if self.start is None:
            return Scope(self.model, self.cell, self.world.distributed)
        state = {"model": self.model.state_dict(), "optimizer": {}}
        parent.load(self.start, self._placed(state)["model"])
        scope = Scope(self.model, self.cell, self.world.distributed)
        scope.count_background(self.cell, self.start.run)
        return scope

    def _knowledge(self) -> KnowledgeProber | None:
        """Return the measurements of learning and forgetting, if the cell has them."""
        rows_per_fact = self.cell.data.rows_per_fact
        if self.config.probe_every is None or rows_per_fact is None:
            return None
        run = None if self.config.parent is None else parent.find_parent(self.run, self.cell)
        parent_corpus = None if run is None else parent.corpus_of(run)
        return KnowledgeProber(self.corpus, parent_corpus, self.config.batch_rows // rows_per_fact)

    def _tensors(self, moments: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Return all tensors of a checkpoint: those in use, as DTensors if they are sharded."""
        averaged = {} if self.average is None else {"average": self.average.tensors}
        return self._placed({**self.scope.tensors(), **averaged, "optimizer": moments})

    def _placed(self, state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return tensors as they are, or as DTensors if they are sharded."""
        if not self.world.distributed:
            return state
        from suite.train.sharding import as_dtensors

        return as_dtensors(self.model, state)

    def _restore(self) -> None:
        """Resume from the newest whole checkpoint, if there is one."""
        moments = self.optimizer.state()
        position = checkpoint.restore(self.run, self._tensors(moments), self.world)
        if position is not None:
            self.optimizer.restored(moments)
            self.step, self.train_s = position["step"], position["train_s"]
            self.finished, self.past = position["finished"], position["past"]
        self.saved = self.step
        if self.world.is_first:
            self.run.cut_train(self.step)

    def save(self) -> None:
        """Write a checkpoint of this step. Raises Diverged instead if its loss is not finite."""
        self._check()
        position = {"step": self.step, "train_s": self.train_s, "finished": self.finished, "past": self.past}
        tensors = self._tensors(self.optimizer.state())
        checkpoint.save(self.run, self.step, tensors, position, self.config.keep_checkpoints, self.world, self.branches)
        self.saved = self.step

    def train_step(self) -> dict[str, float | None]:
        """Take one optimizer step over `batch_rows` rows and return the values to log. Raises Diverged.

        On a GPU, a step that is not logged returns the values of the step before and raises if that diverged. So the
        host can launch the next step while the device is busy with this one.
        """
        self.scope.begin_step(self.step)
        lrs = self.optimizer.set_lr(lr_factor(self.config, self.step, self.steps), self.step / self.steps)
        taken = _Taken(self.step + 1, self._backward(), {}, lrs)
        if self.device.type == "cpu":
            self._read(taken)
        taken.norms.update(self.optimizer.step())
        self._after_step()
        self.step += 1
        self._check()
        earlier, self._taken = self._taken, taken
        reads_now = self.device.type == "cpu" or earlier is None or self._is_logged(self.step)
        return self._values(taken if reads_now or earlier is None else earlier)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.steps

    def _check(self) -> None:
        """Raise Diverged if the loss of the last step is not finite."""
        if self._taken is not None:
            self._read(self._taken)

    def _read(self, taken: _Taken) -> None:
        """Read a step's values from the device, once; sum losses over processes. Raises Diverged."""
        if taken.losses:
            return
        # All values on the device at once, since each reading waits for it.
        on_device = {group: norm.double() for group, norm in taken.norms.items() if isinstance(norm, Tensor)}
        numbers = torch.stack([*taken.parts.values(), *on_device.values()]).tolist()
        parts, norms = numbers[: len(taken.parts)], numbers[len(taken.parts) :]
        taken.norms |= zip(on_device, norms, strict=True)
        taken.losses = dict(zip(taken.parts, self.world.total(*parts), strict=True))
        for name, value in taken.losses.items():
            if not math.isfinite(value):
                raise Diverged(f"step {taken.step}: the {name} is {value}")

    def _values(self, taken: _Taken) -> dict[str, float | None]:
        """Return the values of a step to log."""
        self._read(taken)
        norms = {group: float(norm) for group, norm in taken.norms.items()}
        loss = taken.losses["loss"]
        auxiliary = {name: value for name, value in taken.losses.items() if name != "loss"}
        return {
            "loss": loss,
            "lr": taken.lrs["rest"],
            "value_lr": taken.lrs.get("values"),
            "grad_norm": norms["rest"],
            "value_grad_norm": norms.get("values"),
            **auxiliary,
        }

    def _backward(self) -> dict[str, Tensor]:
        """Compute gradients of the mean loss over the step's targets plus the weighted auxiliary losses of the model.

        Each micro-batch is split over processes, so it has the same rows in any world. The random generator is seeded
        by (seed, step, rank), so that resuming needs no generator state.

        Returns:
            This process's part of the mean loss alone and of the auxiliary losses without their weights (means over
            micro-batches): float64 [] on the device.

        Raises:
            UserError: No row of the step has a target.
        """
        world, parts = self.world, self.world.micro_batches(self.cell)
        key = np.random.SeedSequence((self.cell.seed, self.step, world.rank))
        torch.manual_seed(int(key.generate_state(1)[0]))
        batches, own_targets = self.batches.read(self.step)
        (targets,) = world.total(own_targets)
        if not targets:
            rows, seq_len = self.config.batch_rows, self.cell.data.seq_len
            raise UserError(
                f"train.batch_rows: got {rows}; step {self.step + 1} reads only padding, so no token has a loss; "
                f"use more rows, or longer ones (data.seq_len: got {seq_len})"
            )
        losses = {"loss": torch.zeros((), dtype=torch.float64, device=self.device)}
        for batch in batches:
            self.scope.reads_of(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                x_BTD = self.hidden(batch.tokens_BT, batch.segments_BT, documents=batch.documents)
                part = self.model.loss(x_BTD, batch.targets_BT) / targets
            objective = part
            for name, (weight, value) in self.model.auxiliary_losses().items():
                objective = objective + weight / parts * value
                losses[name] = losses.get(name, 0.0) + value.detach().double() / parts
            objective.backward()
            losses["loss"] = losses["loss"] + part.detach().double()
        self.scope.reads_of(None)
        return losses

    def _after_step(self) -> None:
        if self.world.distributed:
            from suite.train.sharding import sum_statistics

            sum_statistics(self.model, self.world)
        if self.scope.is_whole:  # balancing biases and the like are frozen, too
            self.model.after_step()

    def position(self) -> dict[str, float]:
        """Return the position of the run: step, tokens (padding included), epochs, training FLOPs and seconds."""
        tokens = self.step * self.config.batch_rows * self.cell.data.seq_len
        return {
            "step": self.step,
            "tokens": tokens,
            "epoch": round(self.loader.epoch_at(self.step), 6),
            "train_flops": tokens * self.flops_per_token,
            "wall_s": round(self.train_s, 3),
        }

    def record(self, line: dict[str, Any]) -> None:
        """Log a record of the current step, from rank 0."""
        record = self.position() | line
        for logger in self.loggers:
            logger.log(self.step, record)

    def probe(self) -> None:
        """Score the fixed probes in evaluation mode, log the scores, and decide whether the run stops.

        If the run averages its weights, their scores are logged as "averaged"; they do not stop the run.
        """
        scores = self.prober.run(self.model)
        if self.average is not None:
            with self.average.in_model():
                scores["averaged"] = self.prober.run(self.model)
        self.record(scores)
        storage = scores.get("probe", {}).get("storage")
        if self.config.stop_past is not None and storage is not None:
            # Two probes in a row bracket the crossing, and a single lucky probe does not end the run.
            is_past = self.world.any(storage["bits"] >= self.config.stop_past * storage["bits_max"])
            self.finished = self.finished or (is_past and self.past)
            self.past = is_past

    def measure_knowledge(self) -> None:
        """Record learning and forgetting, and the rows touched, if a measurement is due after the last step."""
        every = self.config.probe_every
        if self.knowledge is not None and every is not None and (self.step % every == 0 or self.step == self.steps):
            scores = self.knowledge.run(self.model, self.step)
            self.record(scores | {"rows_touched": self.optimizer.rows_touched()})

    def run_to_end(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the last step or the stopping rule, logging and saving.

        Args:
            should_stop: Called between steps; if it returns true in any process, all save a checkpoint and stop.

        Returns:
            "done", or "interrupted" if `should_stop` ended the training.
        """
        # A thread that waits for no device or process computes all the time, unless other programs use its core.
        waits = self.device.type != "cpu" or self.world.distributed or self.cell.threads > 1
        telemetry = Telemetry(self.run, self.step, self.steps, self.train_s, waits, quiet=not self.world.is_first)
        if self.step == 0 and not self.run.last_train_line():
            self.measure_knowledge()
        try:
            while not self.finished:
                if self.world.any(should_stop()):
                    if self.saved != self.step:
                        self.save()
                    return "interrupted"
                self._timed_step(telemetry)
                if self.average is not None:
                    self.average.update(self.step)
                if self.step in self.probes:
                    self.probe()
                self.measure_knowledge()
                self.finished = self.finished or self.step == self.steps
                if self.finished or self.step % self.config.checkpoint_every == 0 or self.step in self.branches:
                    self.save()
            return "done"
        finally:
            telemetry.close()
            for logger in self.loggers:
                logger.close()

    def _timed_step(self, telemetry: Telemetry) -> None:
        is_logged = self._is_logged(self.step + 1)
        if is_logged:
            self.reads.start()
        started, cpu_started = time.perf_counter(), time.process_time()
        values = self.train_step()
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        loss = values["loss"]
        assert loss is not None
        telemetry.stepped(self.step, self.config.batch_rows * self.cell.data.seq_len, seconds, cpu_s, loss)
        self.train_s = telemetry.train_s
        if is_logged:
            self.record(values | telemetry.speed() | self._usage())

    def _usage(self) -> dict[str, Any]:
        """Return the table reads of the last step, and the number of rows that no step has read yet."""
        usage = self.reads.finish()
        if not usage:
            return {}
        for table_usage, table in zip(usage["tables"], self.reads.tables, strict=True):
            table_usage["never_read"] = self.optimizer.never_read(table)
        return {"usage": usage}


def train(
    cell: Cell,
    corpus: Corpus,
    run: RunDir,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a cell to its end, from its newest checkpoint if it has one.

    All processes of the world call it with equal arguments, except for `should_stop`.

    Args:
        cell: The cell to train.
        corpus: Its prepared data.
        run: Its run directory, whose lock the caller in rank 0 holds.
        world: The processes that train together (see parallel.process_group); None: this process alone.
        should_stop: Called between steps; if it returns true in any process, all save a checkpoint and stop.

    Returns:
        "done", or "interrupted" if `should_stop` ended the training.

    Raises:
        Diverged: The loss is not finite. The last checkpoint remains.
    """
    trainer = Trainer(cell, corpus, run, world)
    if trainer.world.is_first:
        print(f"{run.name}: training from step {trainer.step}", file=sys.stderr)
    return trainer.run_to_end(should_stop)
