"""Controls of families with value tables: the same model with a table that cannot do what it is meant to do.

A control separates what a table stores from what surrounds it: extra projections, gates and multiply-adds. It applies
to every family whose configuration is a `TableConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from suite.models.attachments import Attachments
from suite.models.cost import Cost, dense_cost
from suite.models.feedforward import SwiGLU
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.registry import ModelConfig

Control = Literal["one_row", "frozen", "shuffled", "dense"]


class TableConfig(ModelConfig):
    """The option of every family with value tables."""

    control: Control | None = Field(
        default=None,
        description="instead of the family, a control: a table of one row, a frozen random table, addresses shuffled "
        "once, or a dense feed-forward of equal multiply-adds in its place; None: the family",
    )

    output_scale: float | None = Field(
        default=None,
        gt=0,
        description="start of a learned factor on what a table adds, e.g. 0.01 in a trained model; None: no factor",
    )

    @property
    def has_tables(self) -> bool:
        """Whether the model has value tables."""
        return super().has_tables and self.control != "dense"


class DenseStandIn(SwiGLU):
    """A feed-forward in the place of a table.

    It has a norm where a module gets the residual stream itself, and adds its input where the module replaces it. It
    ignores what else the module is given.
    """

    def __init__(self, dim: int, hidden: int, point: str) -> None:
        super().__init__(dim, hidden)
        self.adds_input = point == "input_embedding"
        self.norm = nn.RMSNorm(dim, eps=1e-5) if point in ("input_embedding", "before_attention") else None

    def forward(self, x_BTD: Tensor, *_: object) -> Tensor:
        y_BTD = super().forward(x_BTD if self.norm is None else self.norm(x_BTD))
        return x_BTD + y_BTD if self.adds_input else y_BTD

    def cost(self) -> Cost:
        """Count the feed-forward and the norm."""
        return super().cost() + (Cost() if self.norm is None else dense_cost("norm", self.dim, 0))


def with_control(modules: Attachments, config: ModelConfig) -> Attachments:
    """Apply the control of a configuration, if it has one, to the modules of its family.

    Args:
        modules: The family's modules.
        config: The configuration.

    Returns:
        The modules, with their tables changed or replaced.

    Raises:
        ValueError: A table cannot be replaced by a feed-forward of equal multiply-adds.
    """
    control: Control | None = getattr(config, "control", None)
    if control == "dense":
        return _dense(modules, config.size.dim)
    if control is not None:
        for table in {id(table): table for _, module in modules.named() for table in _tables(module)}.values():
            table.set_control(control)
    return modules


def _tables(module: nn.Module) -> Iterator[MemoryTable]:
    for part in module.modules():
        if isinstance(part, MemoryLayer):
            yield from part.tables


def _dense(modules: Attachments, dim: int) -> Attachments:
    """Replace every memory layer by a feed-forward of as many multiply-adds as it has."""

    def replaced(module: nn.Module, point: str = "feed_forwards") -> nn.Module:
        if isinstance(module, MemoryLayer):
            return _stand_in(module, dim, point)
        for path, part in list(module.named_modules()):
            if isinstance(part, MemoryLayer):
                parent, _, name = path.rpartition(".")
                setattr(module.get_submodule(parent), name, _stand_in(part, dim, "feed_forwards"))
        return module

    def of_layers(placed: Mapping[int, Any], one: Callable[[Any], Any]) -> dict[int, Any]:
        return {layer: one(module) for layer, module in placed.items()}

    if modules.attention_values:
        raise ValueError("control: got 'dense', allowed: another control for a table that is added to attention values")
    return Attachments(
        feed_forwards=[replaced(module) for module in modules.feed_forwards],
        input_embedding=modules.input_embedding and replaced(modules.input_embedding, "input_embedding"),
        before_attention=of_layers(modules.before_attention, lambda module: replaced(module, "before_attention")),
        skips=of_layers(modules.skips, lambda skip: replace(skip, module=replaced(skip.module))),
    )


def _stand_in(layer: MemoryLayer, dim: int, point: str) -> DenseStandIn:
    macs = sum(layer.cost().macs.values())  # type: ignore[operator]
    hidden = round(macs / (3 * dim))
    if hidden == 0:
        raise ValueError(
            f"control: got 'dense', allowed: another control, since the table costs {macs:.0f} multiply-adds per token "
            f"and a feed-forward of width 1 costs {3 * dim}"
        )
    return DenseStandIn(dim, hidden, point)


@contextmanager
def tables_off(tables: list[MemoryTable]) -> Iterator[None]:
    """Read every row of the tables as zeros inside the context."""
    for table in tables:
        table.is_off = True
    try:
        yield
    finally:
        for table in tables:
            table.is_off = False
