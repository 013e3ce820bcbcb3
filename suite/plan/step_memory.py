"""What a training step holds at once, put together from its parts: forward in order, backward in reverse.

Gradients stay to the end. What each part needs is counted in suite/models/memory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STATE_BYTES = 4
"""Of a weight, a gradient or a moment: fp32, also where products are computed in bf16."""


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model beyond its weights: most in its forward, kept for its backward, most in that.

    `weights`: elements of its parameters, tables apart. `copies`: bytes of their copies in bf16, which autocast keeps
    until the backward. `tables`: which tables it reads, by number, and `lookups`: how often each.
    """

    forward: int
    saved: int
    backward: int
    weights: int
    copies: int = 0
    tables: tuple[int, ...] = ()
    lookups: tuple[int, ...] = ()

    def then(self, after: Part) -> Part:
        """Both as one part: what the first saved, and the gradients of the second's weights, stay to the end of it."""
        return Part(
            max(self.forward, self.saved + after.forward),
            self.saved + after.saved,
            max(self.saved + after.backward, self.backward + STATE_BYTES * after.weights),
            self.weights + after.weights,
            self.copies + after.copies,
            self.tables + after.tables,
            self.lookups + after.lookups,
        )


@dataclass(frozen=True)
class TableState:
    """Bytes of tables while they train: of a value, of its moments (and its fp32 copy, if any), of a row's marks.

    `row_wise`: only rows that were read have gradients, else all. Gradients are fp32.
    """

    row_wise: bool = True
    value: int = STATE_BYTES
    moments: int = 2 * STATE_BYTES
    row: int = 9

    @property
    def kept(self) -> int:
        """Of a value from step to step; dense gradients stay, too."""
        return self.value + self.moments + (0 if self.row_wise else STATE_BYTES)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one device. `saved`: kept from forward to backward; `peak`: most alive at once."""

    weights: float
    moments: float
    gradients: float
    saved: float
    peak: float

    @property
    def activations(self) -> float:
        """What the peak holds beyond weights, moments and all gradients."""
        return max(0.0, self.peak - self.weights - self.moments - self.gradients)


@dataclass(frozen=True)
class Parts:
    """A model's parts in forward order (embedding, blocks, head), its tables as (rows, width), what all parts share."""

    parts: tuple[Part, ...]
    tables: tuple[tuple[int, int], ...]
    shared: int

    def step(
        self,
        rest_shards: int = 1,
        value_shards: int = 1,
        micro_batches: int = 1,
        state: TableState = TableState(),
        use: float = 1.0,
    ) -> StepMemory:
        """The step on one of `rest_shards` devices that divide weights, moments and gradients among them.

        Columns of tables are divided among `value_shards`. A part's weights and gradients are whole while it runs,
        where they are divided at all. `micro_batches`: how many make a step; the gradients of earlier ones are there
        from the start. `state`: how tables are kept; `use`: how many rows are read at least once, over what even
        reading would give.
        """
        tables = _Tables(self.tables, value_shards, state, use)
        rest, values = sum(part.weights for part in self.parts) / rest_shards, tables.elements
        weights = STATE_BYTES * rest + state.value * values
        moments = 2 * STATE_BYTES * rest + state.moments * values + tables.marks
        pieces = [tables.gradient(part) for part in self.parts]
        buffer = tables.buffer(pieces, micro_batches)
        gradients = STATE_BYTES * rest + buffer
        always, whole = weights + moments + self.shared, rest_shards == 1
        early = 0.0 if micro_batches == 1 else STATE_BYTES * rest + tables.buffer(pieces, micro_batches - 1)
        saved, peak = 0.0, always + gradients + tables.merging(buffer)
        for part in self.parts:
            running = part.forward + tables.grouping(part) + self._gathered(part, whole)
            peak = max(peak, always + early + saved + running)
            saved += part.saved + (part.copies if whole else 0) + tables.groups(part)
        kept, arrived = saved, 0.0
        for part, piece in zip(reversed(self.parts), reversed(pieces), strict=True):
            kept -= part.saved + (part.copies if whole else 0)
            running = part.backward + piece + self._gathered(part, whole)
            peak = max(peak, always + early + kept + arrived + running)
            kept -= tables.groups(part)
            arrived += tables.arriving(part, piece)
            arrived += 0.0 if micro_batches > 1 else STATE_BYTES * part.weights / rest_shards
        return StepMemory(weights, moments, gradients, saved, peak)

    def _gathered(self, part: Part, whole: bool) -> int:
        """A part's weights as it computes with them, where they are not there as they are."""
        return part.copies or (0 if whole else STATE_BYTES * part.weights)


@dataclass
class _Tables:
    """What a step holds of tables beyond their rows: gradients, the grouping of lookups by row, marks of rows.

    A row-wise buffer keeps one compact piece for each read, until they hold more than twice the table's rows.
    """

    sizes: tuple[tuple[int, int], ...]
    shards: int
    state: TableState
    use: float

    def __post_init__(self) -> None:
        self._met: set[int] = set()

    @property
    def elements(self) -> float:
        """Of all tables, on this device."""
        return sum(rows * width for rows, width in self.sizes) / self.shards

    @property
    def marks(self) -> int:
        """When each row was last brought up to date, its moments too, and whether it was ever read."""
        return sum(self.state.row * rows for rows, _ in self.sizes)

    def gradient(self, part: Part) -> float:
        """Bytes of what the part's backward pass makes."""
        return sum(
            self._rows(table, lookups) * self._row_bytes(table)
            for table, lookups in zip(part.tables, part.lookups, strict=True)
        )

    def arriving(self, part: Part, piece: float) -> float:
        """Bytes that stay of what the part made: all, but for a dense gradient that is summed into an earlier one."""
        first = self.state.row_wise or not self._met.issuperset(part.tables)
        self._met.update(part.tables)
        return piece if first else 0.0

    def buffer(self, pieces: list[float], micro_batches: int) -> float:
        """Bytes of all gradients at the end of that many micro-batches."""
        if not self.state.row_wise:
            return STATE_BYTES * self.elements
        most = sum(2 * rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return min(sum(pieces) * micro_batches, most)

    def merging(self, buffer: float) -> float:
        """Beside the pieces, all of them side by side and their sums by row, while they become one."""
        once = sum(rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return buffer + min(buffer, once) if self.state.row_wise else 0.0

    def groups(self, part: Part) -> float:
        """Lookups in the order of their rows, kept from forward to backward."""
        return sum(8 * lookups for lookups in part.lookups) if self.state.row_wise else 0.0

    def grouping(self, part: Part) -> float:
        """The same while it is made: rows in narrow integers, as they come and sorted."""
        return sum((8 + 4 + 4) * lookups for lookups in part.lookups) if self.state.row_wise else 0.0

    def _rows(self, table: int, lookups: int) -> float:
        rows = self.sizes[table][0]
        return self.use * rows * -math.expm1(-lookups / rows) if self.state.row_wise else rows

    def _row_bytes(self, table: int) -> float:
        return STATE_BYTES * self.sizes[table][1] / self.shards + (8 if self.state.row_wise else 0)
