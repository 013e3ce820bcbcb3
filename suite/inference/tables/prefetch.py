"""Reading rows before the layer that needs them runs, for families whose rows follow from token ids.

The ids are known at the start of a pass. All reads of the pass then start in a thread, in the order of the layers, and
a layer waits only for what the thread has not finished. On a GPU the thread copies rows on a stream of its own. The
rows of product keys follow from the hidden state at the layer, so they cannot be read earlier.

Shapes: B rows of T tokens, W ids of a window, N tokens, S rows read per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from suite.inference.tables.reading import Gathered, StoredRows, stored_rows
from suite.models.attachments import window_of
from suite.models.memory_table import MemoryLayer
from suite.models.transformer import Transformer


class Worker:
    """One thread that calls functions in order, in the inference mode of its caller; on a GPU, on its own stream."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, gather: Callable[[], Gathered], device: torch.device) -> Callable[[], Gathered]:
        """Start a gather of rows.

        Args:
            gather: The function that gathers rows on `device`.
            device: The device.

        Returns:
            A function that waits for the rows and returns them; it raises what the thread raised.
        """
        inference = torch.is_inference_mode_enabled()
        if device.type != "cuda":

            def on_cpu() -> Gathered:
                with torch.inference_mode(inference):
                    return gather()

            return self._thread.submit(on_cpu).result
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))  # until the row numbers exist

        def on_stream() -> tuple[Gathered, torch.cuda.Event]:
            with torch.inference_mode(inference), torch.cuda.stream(stream):
                return gather(), stream.record_event()

        future = self._thread.submit(on_stream)

        def wait() -> Gathered:
            (numbers, parts), event = future.result()
            reader = torch.cuda.current_stream(device)
            reader.wait_event(event)
            for tensor in (numbers, *parts.values()):
                tensor.record_stream(reader)
            return numbers, parts

        return wait


class Prefetcher:
    """Starts the reads of a pass when its ids are known; it is registered in `before_layers` of a model."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.worker = model, Worker()
        self.layers = list(layers_by_ids(model))

    def __call__(self, ids_BTW: Tensor) -> None:
        for rows in stored_rows(self.model):
            rows.ahead.clear()  # a pass that raised leaves reads
        for window, layer in self.layers:
            indices_NS = layer.addresses(ids_BTW[..., -window:])
            assert indices_NS is not None
            for table in layer.tables:
                if isinstance(table.stored, StoredRows) and not table.is_off:
                    table.stored.prefetch(table.rows_of(indices_NS), self.worker.start)


def layers_by_ids(model: Transformer) -> Iterator[tuple[int, MemoryLayer]]:
    """Yield the memory layers whose rows follow from token ids, in the order of a pass, with their windows."""
    device = next(model.parameters()).device
    for module in model.attached().values():
        window = window_of(module)
        if not window:
            continue
        ids_11W = torch.zeros(1, 1, window, dtype=torch.int64, device=device)
        for layer in module.modules():
            if isinstance(layer, MemoryLayer) and layer.addresses(ids_11W) is not None:
                yield window, layer


def rows_follow_ids(model: Transformer) -> bool:
    """Return whether the rows of a table of a model follow from token ids; the model may be on the meta device."""
    return next(layers_by_ids(model), None) is not None


def add_prefetch(model: Transformer) -> None:
    """Let a model whose tables are elsewhere read rows ahead. Raises ValueError if it cannot."""
    if not rows_follow_ids(model):
        raise ValueError(refusal(model.config.family))
    model.before_layers.append(Prefetcher(model))


def refusal(family: str) -> str:
    """Return why the rows of a family are not prefetched."""
    return (
        f"prefetch: got family {family}, whose rows follow from the hidden state, allowed: a family whose rows follow "
        "from token ids, such as engram, ngram_embedding and token_table"
    )
