"""How documents become rows of T tokens, in an order that is a function of a seed.

Shapes: B rows, T = seq_len, U = T + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from suite.data import seeded_random
from suite.data.shards import Round

IGNORED = -100
"""Target of a position that is not scored."""

MIXTURE_BLOCK = 10_000
"""Rows in which a mixture's weights hold exactly; a part's share is therefore a multiple of 0.01 %."""

_DOCUMENTS, _WINDOWS, _MIXTURE = range(3)  # streams of random numbers

Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""tokens, targets and segments, int64 [B, T]"""


class Packing(Protocol):
    """How documents become rows of T tokens."""

    rows_per_epoch: int

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """Compute rows of one epoch.

        Args:
            epoch: The epoch, from 0.
            first: The first row, within the epoch.
            last: The row after the last one.

        Returns:
            Tokens, targets and segments, int64 [last - first, T].
        """


class DocumentPacking:
    """Puts every document whole into one row; for `bios`, where a sentence must be read together with its name.

    With stride S = T - longest document + 1, row i holds the documents that start in [i S, (i + 1) S) of the
    epoch's permuted stream of documents, so they always fit; the rest of the row is padding. The number of
    rows, ceil(tokens / S) of the longest round, is the same in every epoch.
    """

    def __init__(self, rounds: Sequence[Round], seq_len: int, eot_id: int, seed: int) -> None:
        longest = max(int(r.lengths.max()) for r in rounds)
        assert longest <= seq_len, "the longest document must fit a row"
        self._rounds, self._seq_len, self._eot_id, self._seed = rounds, seq_len, eot_id, seed
        self._stride = seq_len - longest + 1
        self.rows_per_epoch = -(-max(len(r.tokens) for r in rounds) // self._stride)
        self._orders: dict[int, _DocumentOrder] = {}

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """See Packing."""
        order = self._order(epoch)
        low, high = np.searchsorted(order.rows, (first, last))
        rows, columns = order.rows[low:high] - first, order.columns[low:high]
        lengths = order.lengths[low:high]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(order.sources[low:high], lengths) + within
        read = self._rounds[epoch % len(self._rounds)].tokens[source]
        # documents begin with eot, so the next one's first token is the target of each one's last
        following = np.append(read[1:], self._eot_id) if len(read) else read
        place = np.repeat(rows * self._seq_len + columns, lengths) + within
        tokens_BT = np.full((last - first, self._seq_len), self._eot_id, dtype=np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORED)
        tokens_BT.ravel()[place] = read
        targets_BT.ravel()[place] = following
        starts_BT = np.zeros_like(tokens_BT)
        starts_BT[rows, columns] = 1
        filled = np.bincount(rows, weights=lengths, minlength=last - first).astype(np.int64)
        padded = np.flatnonzero(filled < self._seq_len)
        starts_BT[padded, filled[padded]] = 1
        return tokens_BT, targets_BT, np.cumsum(starts_BT, axis=1) - 1

    def _order(self, epoch: int) -> _DocumentOrder:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a batch may straddle two epochs
                del self._orders[min(self._orders)]
            documents = self._rounds[epoch % len(self._rounds)]
            permuted = seeded_random.permutation(len(documents.lengths), self._seed, epoch, _DOCUMENTS)
            self._orders[epoch] = _DocumentOrder.of(documents, permuted, self._stride)
        return self._orders[epoch]


@dataclass(frozen=True)
class _DocumentOrder:
    """Documents of an epoch in order: row and column where each begins, its first token in the shard."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    sources: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, documents: Round, permuted: NDArray[np.int64], stride: int) -> _DocumentOrder:
        lengths = documents.lengths[permuted]
        starts = np.cumsum(lengths) - lengths
        rows = starts // stride
        is_first = np.diff(rows, prepend=-1) > 0
        first_start = starts[is_first][np.cumsum(is_first) - 1]
        return cls(rows, starts - first_start, documents.starts[:-1][permuted], lengths)


class OrderedPacking:
    """One document per row, in the order of the stream, the rest of the row padded; for streams of new facts."""

    def __init__(self, rounds: Sequence[Round], seq_len: int, eot_id: int) -> None:
        self._rounds, self._seq_len, self._eot_id = rounds, seq_len, eot_id
        self.rows_per_epoch = len(rounds[0].lengths)

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """See Packing."""
        documents = self._rounds[epoch % len(self._rounds)]
        lengths_B = documents.lengths[first:last]
        column_T = np.arange(self._seq_len)
        is_text_BT = column_T < lengths_B[:, None]
        index_BT = np.minimum(documents.starts[first:last, None] + column_T, len(documents.tokens) - 1)
        tokens_BT = np.where(is_text_BT, documents.tokens[index_BT].astype(np.int64), self._eot_id)
        following_BT = np.append(tokens_BT[:, 1:], np.full((last - first, 1), self._eot_id), axis=1)
        return tokens_BT, np.where(is_text_BT, following_BT, IGNORED), (~is_text_BT).astype(np.int64)


class WindowPacking:
    """Splits the stream of all documents into windows of T tokens, which are permuted; for text.

    A document that crosses the end of a window continues in another row, without its beginning. Only the last window is
    padded. Memory does not grow with the stream. `part` gives each part of a mixture its own order.
    """

    def __init__(self, rounds: Sequence[Round], seq_len: int, eot_id: int, seed: int, part: int = 0) -> None:
        self._tokens = [r.tokens for r in rounds]
        self._seq_len, self._eot_id, self._key = seq_len, eot_id, (seed, part)
        self.rows_per_epoch = -(-max(len(tokens) for tokens in self._tokens) // seq_len)

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """See Packing."""
        stream = self._tokens[epoch % len(self._tokens)]
        order = seeded_random.shuffled(np.arange(first, last), self.rows_per_epoch, *self._key, epoch, _WINDOWS)
        index_BU = order[:, None] * self._seq_len + np.arange(self._seq_len + 1)  # U = T + 1
        read_BU = stream[np.minimum(index_BU, len(stream) - 1)].astype(np.int64)
        read_BU[index_BU >= len(stream)] = self._eot_id
        outside_BT = index_BU[:, :-1] >= len(stream)
        tokens_BT, targets_BT = read_BU[:, :-1], np.where(outside_BT, IGNORED, read_BU[:, 1:])
        first_pad_BT = index_BU[:, :-1] == len(stream)
        starts_BT = np.where(outside_BT, first_pad_BT, tokens_BT == self._eot_id)
        return np.ascontiguousarray(tokens_BT), targets_BT, np.cumsum(starts_BT, axis=1)


class MixturePacking:
    """Mixes the rows of several packings by weight. Each row belongs to one part, so that weights count tokens.

    Every block of MIXTURE_BLOCK rows contains the same number of rows of a part: its weight's share of the block, by
    largest remainders, in an order that is a function of (seed, block). The rows of a part follow the order of its own
    epochs, so its j-th row can be computed directly. An epoch of the mixture has as many rows as its parts together.
    """

    def __init__(self, parts: Sequence[Packing], weights: Sequence[float], seed: int) -> None:
        self._parts, self._seed = parts, seed
        self.quotas = quotas(weights)
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self.rows_per_epoch = sum(part.rows_per_epoch for part in parts)

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """See Packing."""
        begin = epoch * self.rows_per_epoch + first
        part_of, row_of = self.sources(begin, begin + last - first)
        columns: list[NDArray[np.int64]] = []
        for number, part in enumerate(self._parts):
            places = np.flatnonzero(part_of == number)
            if len(places):  # a part's rows are consecutive in its own stream
                read = stream_rows(part, int(row_of[places[0]]), int(row_of[places[-1]]) + 1)
                columns = columns or [np.empty((last - first, column.shape[1]), np.int64) for column in read]
                for column, own in zip(columns, read, strict=True):
                    column[places] = own
        tokens_BT, targets_BT, segments_BT = columns
        return tokens_BT, targets_BT, segments_BT

    def sources(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for rows [begin, end) of the mixture, the part of each and its row within the stream of that part."""
        pieces = []
        for block in range(begin // MIXTURE_BLOCK, -(-end // MIXTURE_BLOCK)):
            inside = slice(max(begin - block * MIXTURE_BLOCK, 0), end - block * MIXTURE_BLOCK)
            pieces.append([column[inside] for column in self._block(block)])
        part_of, row_of = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return part_of, row_of

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if block not in self._blocks:
            while len(self._blocks) > 1:  # a batch may straddle two blocks
                del self._blocks[min(self._blocks)]
            order = seeded_random.permutation(MIXTURE_BLOCK, self._seed, block, _MIXTURE)
            part_of = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
            row_of = np.empty_like(part_of)
            for number, quota in enumerate(self.quotas.tolist()):
                row_of[part_of == number] = block * quota + np.arange(quota)
            self._blocks[block] = part_of, row_of
        return self._blocks[block]


def quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """[parts] rows of each part in a block of MIXTURE_BLOCK: shares rounded down, then by largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * MIXTURE_BLOCK
    result = np.floor(exact).astype(np.int64)
    largest = np.argsort(result - exact, kind="stable")[: MIXTURE_BLOCK - int(result.sum())]
    result[largest] += 1
    return result


def stream_rows(packing: Packing, begin: int, end: int) -> Rows:
    """Read rows of a packing's endless stream of epochs.

    Args:
        packing: The packing.
        begin: The first row.
        end: The row after the last one.

    Returns:
        Tokens, targets and segments, int64 [end - begin, T].
    """
    parts: list[Rows] = []
    while begin < end:
        epoch, first = divmod(begin, packing.rows_per_epoch)
        last = min(packing.rows_per_epoch, first + end - begin)
        parts.append(packing.rows(epoch, first, last))
        begin += last - first
    if len(parts) == 1:
        return parts[0]
    tokens_BT, targets_BT, segments_BT = (np.concatenate(column) for column in zip(*parts, strict=True))
    return tokens_BT, targets_BT, segments_BT
