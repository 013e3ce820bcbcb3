"""LoRA: a frozen matrix W becomes W + (alpha / rank) * B A, of which A and B are trained.

Hu et al. 2021 (arXiv 2106.09685), section 4.1, with peft's conventions: A is Kaiming-uniform with a = sqrt(5), and B is
zero. A stack of matrices (experts) has an A and a B for each. Checkpoints hold the sums as the model's weights, so that
a run with LoRA is evaluated, exported and started from like any other, and W, A and B next to them for resuming.

Shapes: O rows and I columns of a matrix, R rank; leading dimensions of stacks are written `...`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from suite.errors import UserError
from suite.models.initial_weights import generator_of
from suite.models.transformer import Transformer
from suite.trainable import TrainLoRA

MARK = ".parametrizations."


class LowRank(nn.Module):
    """The map W -> W + scale * B A."""

    def __init__(self, matrix: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = matrix.shape
        self.scale = scale
        bound = 1 / math.sqrt(columns)  # kaiming_uniform_ with a = sqrt(5)
        drawn = torch.empty(*stack, rank, columns, dtype=matrix.dtype).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(drawn.to(matrix.device))
        self.B = nn.Parameter(matrix.new_zeros(*stack, rows, rank))

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.scale * (self.B @ self.A)


def add(model: Transformer, config: TrainLoRA, seed: int) -> list[str]:
    """Add trainable matrices of low rank to a model and freeze all else.

    Args:
        model: The model.
        config: Rank, scale and modules.
        seed: Seed of A; each matrix has a generator of its own.

    Returns:
        The names of the adapted matrices.

    Raises:
        UserError: `modules` has an entry that no matrix matches.
    """
    matrices = model.hidden_matrices()
    chosen = matrices if config.modules is None else _matching(matrices, config.modules)
    model.requires_grad_(False)
    for name in chosen:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        matrix = cast(Tensor, getattr(module, attribute))
        generator = generator_of(seed, f"lora/{name}")
        scale = (config.alpha or config.rank) / config.rank
        parametrize.register_parametrization(module, attribute, LowRank(matrix.detach(), config.rank, scale, generator))
    return chosen


def _matching(matrices: list[str], modules: tuple[str, ...]) -> list[str]:
    """Return the matrices of modules whose name ends in one of `modules`. Raises UserError."""
    names = {matrix: matrix.removesuffix(".weight") for matrix in matrices}
    for module in modules:
        if not any(f".{name}".endswith(f".{module}") for name in names.values()):
            ends = sorted({".".join(name.split(".")[2:]) for name in names.values()})
            raise UserError(f"train.trainable.modules: got {module!r}, allowed: ends of {', '.join(ends)}")
    return [matrix for matrix, name in names.items() if any(f".{name}".endswith(f".{module}") for module in modules)]


def merged_state(model: Transformer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the model under their usual names, sums included, and what the sums are made of.

    The second is empty for a model without LoRA.
    """
    state = model.state_dict()
    parts = {name: tensor for name, tensor in state.items() if MARK in name}
    weights = {name: tensor for name, tensor in state.items() if MARK not in name}
    weights |= dict(_sums(model))
    return weights, parts


@torch.no_grad()
def _sums(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Module) and parametrize.is_parametrized(module):
            for attribute in cast(nn.ModuleDict, module.parametrizations):
                yield f"{path}.{attribute}", getattr(module, attribute)
