"""What one part of a model costs: its parameters, the ones it reads, and its multiply-adds per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Cost:
    """The cost of one part of a model, by named group.

    Attributes:
        params: Parameters that the part owns.
        read: Parameters that the forward pass of one token reads. Rows of a table that are not looked up and
            experts that are not chosen are not read.
        macs: Multiply-adds of matrix products per token in the forward pass.
    """

    params: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            add_counts(self.params, other.params),
            add_counts(self.read, other.read),
            add_counts(self.macs, other.macs),
        )


def dense_cost(group: str, params: int, macs: float) -> Cost:
    """Return the cost of a part that reads all of its parameters for every token.

    Args:
        group: Name of the group that the counts belong to, e.g. "ffn".
        params: Parameters of the part.
        macs: Multiply-adds of matrix products per token in the forward pass; 0 for none.

    Returns:
        The cost, with everything in one group.
    """
    return Cost({group: params}, {group: params}, {group: macs} if macs else {})


def add_counts(first: Mapping[str, N], second: Mapping[str, N]) -> dict[str, N]:
    """Return the sums of two sets of counts, group by group."""
    return {**first, **{name: first.get(name, 0) + count for name, count in second.items()}}
