"""Where the rows of a table are: on the model's device, in host memory, or in a file; and a cache of hot rows.

A store gathers the parts of rows (see forms.py) on the device of the row numbers, and counts rows and bytes by source.

Shapes: R rows of a table, U distinct rows of a read, H rows in the cache, M rows that the cache lacks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from suite.inference.tables.forms import Parts
from suite.models.memory_table import copied_rows

Source = Literal["device", "host", "file"]
SOURCES: tuple[Source, ...] = get_args(Source)


@dataclass
class Traffic:
    """What was read of a table.

    Attributes:
        rows: Rows.
        hits: Those among them that a cache had.
        prefetched: Those among them whose read started before the layer ran.
        device: Bytes from the device.
        host: Bytes from host memory.
        file: Bytes from a file.
        wait_s: Seconds in which layers waited for rows.
    """

    rows: int = 0
    hits: int = 0
    prefetched: int = 0
    device: int = 0
    host: int = 0
    file: int = 0
    wait_s: float = 0.0

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Return what was read since an earlier count."""
        return Traffic(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def line(self) -> str:
        """Return the counts in one line."""
        cached = f", {self.hits / self.rows:.1%} from the cache" if self.hits else ""
        cached += f", {self.prefetched / self.rows:.1%} prefetched" if self.prefetched else ""
        read = ", ".join(f"{getattr(self, source):,} bytes from {source}" for source in SOURCES)
        return f"{self.rows:,} rows read{cached}; {read}; layers waited {self.wait_s:.3g} s for rows"

    def add(self, source: Source, count: int) -> None:
        """Add bytes that were read from a source."""
        setattr(self, source, getattr(self, source) + count)


class RowStore(nn.Module):
    """The parts of a table in one place. Those on the device are buffers, which move with the model.

    Rows in host memory or in a file are gathered there by the CPU, and the gathered rows are copied to the device: in
    their stored form, and from pinned memory if the device is a GPU.

    Args:
        parts: The parts of the whole table. For a file they are mapped from it.
        source: The place.
        path: The file, of which `evict` drops the pages.
    """

    def __init__(self, parts: Parts, source: Source = "device", path: Path | None = None) -> None:
        super().__init__()
        self.source, self.path = source, path
        self.names = tuple(parts)
        self.rows = len(next(iter(parts.values())))
        self.row_bytes = sum(part[:1].nbytes for part in parts.values())
        self.traffic = Traffic()
        if source == "device":
            for name, part in parts.items():
                self.register_buffer(name, part)
        else:
            pinned = source == "host" and torch.cuda.is_available()
            self._elsewhere = {name: part.pin_memory() if pinned else part for name, part in parts.items()}

    @property
    def parts(self) -> Parts:
        """The parts of the whole table."""
        return {name: self.get_buffer(name) for name in self.names} if self.source == "device" else self._elsewhere

    def gather(self, rows_U: Tensor) -> Parts:
        """Return the parts of distinct rows, int64 [U], on the device of `rows_U`."""
        self.traffic.rows += len(rows_U)
        self.traffic.add(self.source, len(rows_U) * self.row_bytes)
        if self.source == "device":
            return {name: part.index_select(0, rows_U) for name, part in self.parts.items()}
        here_U = rows_U.cpu()
        return {name: copied_rows(part, here_U, rows_U.device) for name, part in self.parts.items()}

    def evict(self) -> None:
        """Drop the pages of a mapped file from memory, so that the next read is cold; otherwise do nothing."""
        if self.source != "file":
            return
        assert self.path is not None
        for part in self.parts.values():
            advise(part, mmap.MADV_DONTNEED)
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class CachedRows(nn.Module):
    """A store, and the parts of some of its rows on the device.

    The cache is static if it is created with `hot` rows. Otherwise it holds the rows that were read last (LRU): the
    rows of a read are looked up together, and then become the newest, in their order.

    Args:
        store: The store of the whole table.
        size: Rows in the cache (H).
        hot: The rows of a static cache, int64 [H].
    """

    slot_R: Tensor
    row_H: Tensor
    stamp_H: Tensor

    def __init__(self, store: RowStore, size: int, hot: Tensor | None = None) -> None:
        super().__init__()
        self.store, self.size, self.is_static = store, size, hot is not None
        self.row_bytes, self.rows = store.row_bytes, store.rows
        self.traffic = store.traffic
        self.clock = 0
        parts = {name: part[:1].cpu() for name, part in store.parts.items()}
        self.cached = RowStore({name: part.new_zeros(size, *part.shape[1:]) for name, part in parts.items()})
        self.cached.traffic = store.traffic
        self.register_buffer("slot_R", torch.full((store.rows,), -1, dtype=torch.int32))
        self.register_buffer("row_H", torch.full((size,), -1))
        self.register_buffer("stamp_H", torch.full((size,), -1))
        if hot is not None:
            assert len(hot) == size
            self._insert(torch.arange(size), hot, {name: part[hot] for name, part in store.parts.items()})

    @property
    def source(self) -> Source:
        """The place of the whole table."""
        return self.store.source

    def gather(self, rows_U: Tensor) -> Parts:
        """Return the parts of distinct rows, int64 [U], on the device of `rows_U`."""
        slots_U = self.slot_R[rows_U].long()
        is_hit_U = slots_U >= 0
        hits, misses = is_hit_U.nonzero().squeeze(1), (~is_hit_U).nonzero().squeeze(1)
        self.traffic.hits += len(hits)
        if not len(misses):
            gathered = self.cached.gather(slots_U)
        else:
            read = self.store.gather(rows_U[misses])
            gathered = {name: part.new_empty(len(rows_U), *part.shape[1:]) for name, part in read.items()}
            for name, part in self.cached.gather(slots_U[hits]).items():
                gathered[name][hits] = part
                gathered[name][misses] = read[name]
        if not self.is_static:
            self._remember(rows_U, slots_U, gathered)
        return gathered

    def _remember(self, rows_U: Tensor, slots_U: Tensor, gathered: Parts) -> None:
        """Make the rows of a read the newest of the cache; of more rows than it holds, the last ones."""
        first = max(0, len(rows_U) - self.size)
        rows_U, slots_U = rows_U[first:], slots_U[first:]
        stamps_U = self.clock + torch.arange(len(rows_U), device=rows_U.device)
        self.clock += len(rows_U)
        is_hit_U = slots_U >= 0
        self.stamp_H[slots_U[is_hit_U]] = stamps_U[is_hit_U]
        misses = (~is_hit_U).nonzero().squeeze(1)
        if len(misses):
            oldest = self.stamp_H.topk(len(misses), largest=False).indices
            self._insert(oldest, rows_U[misses], {name: part[first:][misses] for name, part in gathered.items()})
            self.stamp_H[oldest] = stamps_U[misses]

    def _insert(self, slots: Tensor, rows: Tensor, parts: Parts) -> None:
        replaced = self.row_H[slots]
        self.slot_R[replaced[replaced >= 0]] = -1
        self.row_H[slots] = rows
        self.slot_R[rows] = slots.to(torch.int32)
        for name, part in self.cached.parts.items():
            part[slots] = parts[name].to(part.device)

    def evict(self) -> None:
        """Empty an LRU cache, and drop the pages of the store's file from memory."""
        self.store.evict()
        if not self.is_static:
            self.slot_R.fill_(-1)
            self.row_H.fill_(-1)
            self.stamp_H.fill_(-1)


def rows_of_share(share: float, rows: int) -> int:
    """Return the number of rows of a share of a table, at least one."""
    return max(1, round(share * rows))


def advise(mapped: Tensor, advice: int) -> None:
    """Call madvise on the whole pages of a tensor that is mapped from a file.

    Args:
        mapped: The tensor, contiguous.
        advice: A constant of the module mmap, such as MADV_RANDOM.

    Raises:
        OSError: The system refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(advice)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
