"""The parameters that a cell trains (`train.trainable`): freezes the others, and chooses the rows of each step."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from suite.cells import Cell
from suite.data.loader import Batch
from suite.errors import UserError
from suite.models.transformer import Transformer
from suite.records import RunDir
from suite.train.batches import MicroBatch
from suite.train.finetuning import lora
from suite.train.finetuning.parent import corpus_of
from suite.train.finetuning.rows import RowChoice, expert_stacks
from suite.trainable import TrainLoRA, TrainParameters, TrainRows


class Scope:
    """The parameters that a cell trains. Creating it freezes all others.

    Args:
        model: The model, with the weights that training starts from.
        cell: The cell.
        distributed: Whether several processes train together.

    Raises:
        UserError: The model has nothing of the kind, or several processes train.
    """

    def __init__(self, model: Transformer, cell: Cell, distributed: bool = False) -> None:
        self.model, self.config = model, cell.train.trainable
        self.choice: RowChoice | None = None
        if self.is_whole:
            return
        if distributed:
            raise UserError(
                f"train.trainable.kind: got {self.config.kind!r}, allowed: all where several processes train together"
            )
        if isinstance(self.config, TrainLoRA):
            lora.add(model, self.config, cell.seed)
            return
        model.requires_grad_(False)
        for name, parameter in self._moving().items():
            assert isinstance(parameter, nn.Parameter), name
            parameter.requires_grad_(True)
        if isinstance(self.config, TrainRows):
            self.choice = RowChoice(model, self.config, cell.seed)

    @property
    def is_whole(self) -> bool:
        """Whether everything moves, the statistics of the model included."""
        return self.config.kind == "all"

    def _moving(self) -> dict[str, nn.Parameter]:
        """Return the parameters that move, by name. Raises UserError if there is none."""
        parameters = dict(self.model.named_parameters())
        if isinstance(self.config, TrainParameters):
            for pattern in self.config.patterns:
                if not any(re.fullmatch(pattern, name) for name in parameters):
                    raise UserError(
                        f"train.trainable.patterns: got {pattern!r}, which matches no parameter, allowed: patterns of"
                        f" whole names such as {next(iter(parameters))}"
                    )
            return {
                name: parameter
                for name, parameter in parameters.items()
                if any(re.fullmatch(pattern, name) for pattern in self.config.patterns)
            }
        rows = {id(table.weight) for table in self.model.memory_tables()}
        rows |= {id(stack) for experts in expert_stacks(self.model).values() for stack in experts.parameters()}
        if not rows:
            raise UserError(
                f"train.trainable.kind: got {self.config.kind!r}, allowed: all, lora, parameters for"
                f" {self.model.config.family}, which has neither tables nor experts that tokens choose"
            )
        return {name: parameter for name, parameter in parameters.items() if id(parameter) in rows}

    def count_background(self, cell: Cell, parent: RunDir | None) -> None:
        """Count the background reads of TF-IDF, where the cell needs them, with the weights of its parent.

        A background batch has as many rows as a step of the cell (our choice; the paper does not state its size).

        Args:
            cell: The cell.
            parent: The run that the weights are from.

        Raises:
            UserError: The parent has no training data.
        """
        if self.choice is None or not isinstance(self.config, TrainRows) or self.config.score != "tfidf":
            return
        assert parent is not None, "TrainConfig requires a parent"
        corpus = corpus_of(parent)
        if corpus is None:
            raise UserError(
                f"train.trainable.score: got 'tfidf', allowed: tf, reads, random for {parent.path}, an imported"
                " checkpoint without data for background counts"
            )
        loader = corpus.loader(cell.seed, cell.train.batch_rows)
        self.choice.count_background(self.model, map(loader.batch, range(self.config.background)))

    def begin_step(self, step: int) -> None:
        """Set the model to training mode, frozen batch norms excepted, and count reads from zero."""
        self.model.train()
        if self.is_whole:
            return
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        if self.choice is not None:
            self.choice.begin(step)

    def reads_of(self, batch: Batch | MicroBatch | None) -> None:
        """Count the reads of a micro-batch from now on; None: stop counting."""
        if self.choice is None:
            return
        if batch is None:
            self.choice.counts.stop()
        else:
            self.choice.counts.start(batch.targets_BT.to(self.model.embedding.weight.device))

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return the tensors of a checkpoint besides the optimizer's: the model's weights, and what LoRA and TF-IDF
        need to resume."""
        weights, parts = lora.merged_state(self.model)
        tensors: dict[str, dict[str, Any]] = {"model": weights}
        if parts:
            tensors["lora"] = parts
        if self.choice is not None:
            background: dict[str, Tensor] = self.choice.background
            tensors["background"] = background
        return tensors
