"""Adds up the memory of a training step from its parts: forward in order, backward in reverse order.

Gradients stay allocated to the end of the step. `activation_memory` measures what each part needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.embedding_bag.gradients import MOSTLY

STATE_BYTES = 4
"""Bytes of a weight, a gradient or a moment: fp32, also where products are computed in bf16."""
INDEX_BYTES = 8
"""Bytes of an int64 row index."""
SORT_BYTES = INDEX_BYTES + 2 * 4
"""Bytes per lookup while lookups are sorted by row: the order, and int32 rows before and after."""


def exchanged_rows(rows: int, read: float) -> float:
    """Return the rows over which replicas of a table sum gradients.

    Args:
        rows: Rows of the table.
        read: Rows that any replica has read or, on GPUs, lookups of all replicas.
    """
    return rows if read >= MOSTLY * rows else read


@dataclass(frozen=True)
class Part:
    """The memory of one part of the model, in bytes beyond its weights.

    Attributes:
        forward: Peak of the forward pass.
        saved: Saved by the forward pass for the backward pass.
        backward: Peak of the backward pass.
        weights: Elements of the parameters outside tables.
        copies: Bytes of the weights' bf16 copies, which autocast holds until the backward pass.
        tables: The indices of the tables that the part reads, in order.
        lookups: Rows read from each of these tables.
        frozen: The indices of the tables that it reads and that are not trained.
        frozen_lookups: Rows read from each of them.
    """

    forward: int
    saved: int
    backward: int
    weights: int
    copies: int = 0
    tables: tuple[int, ...] = ()
    lookups: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    frozen_lookups: tuple[int, ...] = ()


@dataclass(frozen=True)
class TableState:
    """Bytes of tables while they train; gradients are fp32.

    Attributes:
        row_wise: Whether only rows that were read have gradients, rather than all.
        value: Bytes of a value.
        moments: Bytes of a value's moments, and of its fp32 copy if there is one.
        row: Bytes of state per row, independent of its width.
        host: Whether tables, their moments and gradients are in host memory; reads then use copies of rows.
        average: Bytes of the average of each trained weight, of tables and of all others (train.probe_average).
        places: Whether row-wise gradients are on a GPU, where the host does not know how many rows were read: every
            lookup has a place, until there are so many that a buffer of the whole table replaces them.
    """

    row_wise: bool = True
    value: int = STATE_BYTES
    moments: int = 2 * STATE_BYTES
    row: int = 9
    host: bool = False
    average: int = 0
    places: bool = False

    @property
    def persistent(self) -> int:
        """Bytes per value that stay allocated from step to step, dense gradients among them."""
        return self.value + self.moments + self.average + (0 if self.row_wise else STATE_BYTES)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one device.

    Attributes:
        weights: Of the weights.
        moments: Of the moments, and of the average of the weights if there is one.
        gradients: Of all gradients.
        saved: Of activations saved for the backward pass.
        peak: The maximum of all together.
        host: The maximum in host memory, for tables that are there: rows, moments, gradients and pinned buffers.
        pinned: The part of `host` by which pinned buffers exceed the gradients in them; none where the device is a CPU.
        whole: The maximum of the process where device and host are one CPU.
    """

    weights: float
    moments: float
    gradients: float
    saved: float
    peak: float
    host: float
    pinned: float
    whole: float

    @property
    def activations(self) -> float:
        """Bytes of the peak beyond weights, moments and all gradients."""
        return max(0.0, self.peak - self.weights - self.moments - self.gradients)


@dataclass(frozen=True)
class Parts:
    """The parts of a model.

    Attributes:
        parts: Embedding, a module at the input embedding if there is one, blocks and head, in forward order.
        tables: Rows and width of each table that is trained.
        shared: Bytes that all parts share.
        counts: Bytes of the counts of reads in a step that is logged.
        frozen: Rows and width of each table that is not trained.
    """

    parts: tuple[Part, ...]
    tables: tuple[tuple[int, int], ...]
    shared: int
    counts: int = 0
    frozen: tuple[tuple[int, int], ...] = ()

    def step(
        self,
        rest_shards: int = 1,
        value_shards: int = 1,
        micro_batches: int = 1,
        state: TableState = TableState(),
        use: float = 1.0,
    ) -> StepMemory:
        """Predict the memory of a step on one device.

        Args:
            rest_shards: Devices that divide weights, gradients and moments outside tables. If there are several, a
                part's weights and gradients are gathered while it runs.
            value_shards: Devices that divide the columns of tables.
            micro_batches: Micro-batches of a step. From the second one on, the gradients of the earlier ones are
                allocated from its start.
            state: How tables are stored and updated.
            use: Distinct rows read, relative to the number that uniform lookups would read.

        Returns:
            The memory of the step.
        """
        tables = _Tables(self.tables, value_shards, rest_shards // value_shards, state, use, self.frozen)
        rest = sum(part.weights for part in self.parts) / rest_shards
        frozen = sum(rows * width for rows, width in self.frozen)
        rows = STATE_BYTES * frozen / value_shards + state.value * tables.elements
        row_moments = (state.moments + state.average) * tables.elements + tables.row_state
        buffer, earlier_buffer = (tables.buffer(self.parts, number) for number in (micro_batches, micro_batches - 1))
        host, merging = 0.0, tables.merging(self.parts, micro_batches)
        if state.host:
            host = rows + row_moments + buffer
            rows = row_moments = buffer = earlier_buffer = 0.0
        weights, moments = STATE_BYTES * rest + rows, (2 * STATE_BYTES + state.average) * rest + row_moments
        gradients = STATE_BYTES * rest + buffer
        persistent, is_whole = weights + moments + self.shared + self.counts, rest_shards == 1
        earlier = 0.0 if micro_batches == 1 else STATE_BYTES * rest + earlier_buffer
        # The embedding and the output matrix stay gathered in fp32 to the end of the backward pass.
        root = 0 if is_whole else STATE_BYTES * (self.parts[0].weights + self.parts[-1].weights)
        exchange = tables.exchange(self.parts, micro_batches)
        saved, peak = 0.0, persistent + gradients + (0.0 if state.host else max(exchange, merging))
        for part in self.parts:
            running = part.forward + tables.sorting(part) + tables.copied(part) + self._gathered(part, is_whole)
            peak = max(peak, persistent + earlier + root + saved + running)
            saved += part.saved + (part.copies if is_whole else 0) + tables.order(part) + tables.copied(part)
        remaining, new_gradients = saved, 0.0
        tables.start_backward(self.parts, micro_batches - 1)
        for part in reversed(self.parts):
            remaining -= part.saved + (part.copies if is_whole else 0)
            piece, stays = tables.backward(part)
            running = part.backward + piece + self._gathered(part, is_whole)
            peak = max(peak, persistent + earlier + root + remaining + new_gradients + running)
            remaining -= tables.order(part) + tables.copied(part)
            new_gradients += stays
            new_gradients += 0.0 if micro_batches > 1 else STATE_BYTES * part.weights / rest_shards
        whole = max(peak + host, persistent + gradients + host + merging)
        pinned = tables.pinned(self.parts, micro_batches)
        in_host = host + merging + pinned if state.host else 0.0
        return StepMemory(weights, moments, gradients, saved, peak, in_host, pinned, whole)

    def _gathered(self, part: Part, is_whole: bool) -> int:
        """Return the bytes of a part's weights as it computes with them, unless they are stored so on the device."""
        is_stored = is_whole or part in (self.parts[0], self.parts[-1])
        return part.copies or (0 if is_stored else STATE_BYTES * part.weights)


@dataclass
class _Tables:
    """The bytes that a step allocates for tables in addition to their rows: gradients, sorted lookups, row state.

    Every process reads the lookups of all processes among which columns are divided. On a CPU, the buffer of row-wise
    gradients holds one compact piece per read, until they exceed twice the table's rows; see `TableState.places` for
    GPUs.
    """

    sizes: tuple[tuple[int, int], ...]
    shards: int
    replicas: int
    state: TableState
    use: float
    frozen: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        self._with_gradient: set[int] = set()
        self._reads: list[list[int]] = []

    @property
    def elements(self) -> float:
        """Elements of all tables on this device."""
        return sum(rows * width for rows, width in self.sizes) / self.shards

    @property
    def row_state(self) -> int:
        """Bytes of the state of whole rows, such as when a row was last updated."""
        return sum(self.state.row * rows for rows, _ in self.sizes)

    def gradient(self, part: Part) -> float:
        """Return the bytes of the table gradients that the part's backward pass makes."""
        return sum(
            self._gradient_rows(table, self.shards * lookups) * self._row_bytes(table)
            for table, lookups in zip(part.tables, part.lookups, strict=True)
        )

    def start_backward(self, parts: tuple[Part, ...], micro_batches: int) -> None:
        """Start the backward pass of a micro-batch that follows `micro_batches` others."""
        self._reads = self._all_reads(parts, micro_batches)

    def backward(self, part: Part) -> tuple[float, float]:
        """Return the bytes of table gradients that the next part's backward pass allocates, and those that stay."""
        if not self.state.places:
            piece = self.gradient(part)
            return piece, self._added(part, piece)
        allocated = stays = 0.0
        for table, lookups in zip(part.tables, part.lookups, strict=True):
            before, was_whole = self._held(table, self._reads[table]), self._is_whole(table, self._reads[table])
            self._reads[table].append(self.shards * lookups)
            after, is_whole = self._held(table, self._reads[table]), self._is_whole(table, self._reads[table])
            # What was compact so far is moved to the buffer of the whole table once that exists.
            allocated += after if is_whole and not was_whole else after - before
            stays += after - before
        return allocated, stays

    def _added(self, part: Part, piece: float) -> float:
        """Return the bytes of a part's gradients that stay allocated: 0 if a dense one is added to an earlier one, or
        if they are copied to host memory."""
        if self.state.host:
            return 0.0
        stays = self.state.row_wise or not self._with_gradient.issuperset(part.tables)
        self._with_gradient.update(part.tables)
        return piece if stays else 0.0

    def buffer(self, parts: tuple[Part, ...], micro_batches: int) -> float:
        """Return the bytes of all table gradients after that many micro-batches."""
        if not self.state.row_wise:
            return STATE_BYTES * self.elements
        if self.state.places:
            return sum(self._held(table, reads) for table, reads in enumerate(self._all_reads(parts, micro_batches)))
        limit = sum(2 * rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return min(sum(map(self.gradient, parts)) * micro_batches, limit)

    def merging(self, parts: tuple[Part, ...], micro_batches: int) -> float:
        """Return the bytes needed to merge the pieces: their concatenation, and the sums by row."""
        if not self.state.row_wise:
            return 0.0
        if self.state.places:
            return sum(
                self._held(table, reads) + self._held(table, [sum(reads)])
                for table, reads in enumerate(self._all_reads(parts, micro_batches))
                if len(reads) > 1 and not self._is_whole(table, reads)
            )
        buffer = self.buffer(parts, micro_batches)
        return buffer + min(buffer, sum(rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes)))

    def _all_reads(self, parts: tuple[Part, ...], micro_batches: int) -> list[list[int]]:
        """Return the lookups of every read of each table in some micro-batches."""
        reads: list[list[int]] = [[] for _ in self.sizes]
        for part in parts:
            for table, lookups in zip(part.tables, part.lookups, strict=True):
                reads[table] += [self.shards * lookups] * micro_batches
        return reads

    def _is_whole(self, table: int, reads: list[int]) -> bool:
        """Return whether a GPU sums the gradients of these reads in a buffer of the whole table."""
        return sum(reads) >= MOSTLY * self.sizes[table][0] and bool(reads)

    def _held(self, table: int, reads: list[int]) -> float:
        """Return the bytes of the gradients of some reads on a GPU: places for lookups, or the whole table."""
        rows, width = self.sizes[table]
        if self._is_whole(table, reads):
            return (rows + 1) * (STATE_BYTES * width / self.shards + 1)
        return sum(min(lookups, rows + 1) for lookups in reads) * self._row_bytes(table)

    def copied(self, part: Part) -> float:
        """Return the bytes of copies of the rows that a part reads from host memory, with their numbers."""
        return sum(rows * (row_bytes + INDEX_BYTES) for rows, row_bytes in self._copies(part))

    def _copies(self, part: Part) -> list[tuple[float, int]]:
        """Return the rows that each read of a part copies from host memory, and the bytes of a row."""
        if not self.state.host:
            return []
        trained = zip(part.tables, part.lookups, strict=True)
        frozen = zip(part.frozen, part.frozen_lookups, strict=True)
        reads = [(*self.sizes[table], lookups, self.state.value) for table, lookups in trained]
        reads += [(*self.frozen[table], lookups, STATE_BYTES) for table, lookups in frozen]
        return [(self._distinct(rows, lookups), value * width) for rows, width, lookups, value in reads]

    def pinned(self, parts: tuple[Part, ...], micro_batches: int) -> float:
        """Return the bytes of pinned buffers beyond the gradients in them, which `buffer` counts.

        Torch rounds a pinned buffer up to a power of two, and keeps it for the next one of that size. Buffers of the
        rows of one part are in use at a time, since the next read waits for the device; those of gradients are in use
        until they are merged.
        """
        if not self.state.host:
            return 0.0
        copies = max(sum(_rounded(rows * row_bytes) for rows, row_bytes in self._copies(part)) for part in parts)
        gradients = [
            STATE_BYTES * self.sizes[table][1] * self._gradient_rows(table, lookups)
            for part in parts
            for table, lookups in zip(part.tables, part.lookups, strict=True)
        ]
        once = sum(map(self.gradient, parts))
        kept = self.buffer(parts, micro_batches) / once if once else 0.0  # micro-batches until they are merged
        return copies + kept * sum(_rounded(size) - size for size in gradients)

    def exchange(self, parts: tuple[Part, ...], micro_batches: int) -> float:
        """Return the bytes of the sums over replicas and of the flags of their rows; dense ones are summed in place."""
        if self.replicas == 1 or not self.state.row_wise:
            return 0.0
        flags = sum(2 * rows for rows, _ in self.sizes)
        return flags + sum(
            self._exchanged(table, reads) for table, reads in enumerate(self._all_reads(parts, micro_batches))
        )

    def _exchanged(self, table: int, reads: list[int]) -> float:
        """Return the bytes of a table's sums over replicas, unless a buffer of the whole table exists already."""
        rows, lookups = self.sizes[table][0], self.replicas * sum(reads)
        if not self.state.places:
            return exchanged_rows(rows, self._gradient_rows(table, lookups)) * self._row_bytes(table)
        return 0.0 if self._is_whole(table, reads) else self._held(table, [lookups])

    def order(self, part: Part) -> float:
        """Return the bytes of the order of lookups by row, which is saved for the backward pass."""
        return sum(INDEX_BYTES * self.shards * lookups for lookups in part.lookups) if self.state.row_wise else 0.0

    def sorting(self, part: Part) -> float:
        """Return the bytes allocated while that order is computed."""
        return sum(SORT_BYTES * self.shards * lookups for lookups in part.lookups) if self.state.row_wise else 0.0

    def _gradient_rows(self, table: int, lookups: int) -> float:
        """Return the number of rows that have a gradient after that many lookups."""
        rows = self.sizes[table][0]
        return self._distinct(rows, lookups) if self.state.row_wise else rows

    def _distinct(self, rows: int, lookups: int) -> float:
        """Return the distinct rows of a table of that many rows that lookups read."""
        return self.use * rows * -math.expm1(-lookups / rows)

    def _row_bytes(self, table: int) -> float:
        """Return the bytes of a row's gradient on this device, with its index where gradients are row-wise."""
        return STATE_BYTES * self.sizes[table][1] / self.shards + (INDEX_BYTES if self.state.row_wise else 0)


def _rounded(size: float) -> float:
    """Return the bytes that torch allocates for a pinned buffer of that many."""
    return 2.0 ** math.ceil(math.log2(size)) if size else 0.0
