"""What decoding stores of earlier tokens, and which earlier tokens a module may read.

Shapes: B rows, T tokens of the call, L stored tokens and those of the call, G key-value heads, K head width, C columns,
W tokens of a window, S numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Earlier = Callable[[Tensor, Sequence[int]], Tensor]
"""`earlier(x_BTC, steps)` returns, for each number of steps, x of the token that many positions before each token, in
one tensor [S, B, T, C]; zero where the document has none. A module may call it once per forward pass."""


class Cache:
    """Keys and values of earlier tokens, for generation; holds `length` tokens and at most `max_len`."""

    def __init__(self, layers: int, batch: int, max_len: int) -> None:
        self.batch, self.max_len, self.length = batch, max_len, 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._last: dict[Hashable, tuple[int, Tensor]] = {}

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values.

        Args:
            layer: The layer's index.
            k_BGTK: Its new keys.
            v_BGTK: Its new values.

        Returns:
            All keys and all values of the layer, [B, G, L, K] each.
        """
        batch, kv_heads, tokens, width = k_BGTK.shape
        stored = self._layers[layer]
        if stored is None:
            shape = (batch, kv_heads, self.max_len, width)
            stored = self._layers[layer] = (k_BGTK.new_empty(shape), v_BGTK.new_empty(shape))
        end = self.length + tokens
        for buffer, new in zip(stored, (k_BGTK, v_BGTK), strict=True):
            buffer[:, :, self.length : end] = new
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def remember(self, slot: Hashable, x_BTC: Tensor, last: int) -> Tensor:
        """Store the new rows of a sequence other than keys and values, such as token ids or a convolution's inputs.

        Args:
            slot: Identifies the sequence.
            x_BTC: Its rows for the tokens of the call.
            last: Number of rows before a token that are needed.

        Returns:
            The rows [B, L, C] of the `last` tokens before the call (fewer at the start), and of the call.

        Raises:
            ValueError: The sequence was stored twice in one forward pass, or not in an earlier one.
        """
        end, stored = self._last.get(slot, (0, None))
        if end != self.length:
            raise ValueError(f"{slot}: rows of {end} tokens are stored, allowed: {self.length}, once per forward pass")
        rows_BLC = x_BTC if stored is None else torch.cat((stored, x_BTC), 1)
        self._last[slot] = (end + x_BTC.shape[1], rows_BLC[:, max(0, rows_BLC.shape[1] - last) :])
        return rows_BLC

    def select(self, rows_B: Tensor) -> None:
        """Keep only the rows with these indices."""
        self.batch = len(rows_B)
        self._layers = [stored and (stored[0][rows_B], stored[1][rows_B]) for stored in self._layers]
        self._last = {slot: (end, stored[rows_B]) for slot, (end, stored) in self._last.items()}


@dataclass(frozen=True)
class EarlierTokens:
    """The tokens before each token of a call, in the call and in the cache; only those of the same document exist.

    Attributes:
        past: Number of cached tokens.
        segments_BT: Document numbers, int64; None if every row is one document.
        cache: The cache of the call; None without one.
        pad_B: Number of padding tokens at the left of each row, cached ones included; None for none.
    """

    past: int = 0
    segments_BT: Tensor | None = None
    cache: Cache | None = None
    pad_B: Tensor | None = None

    def windows(self, tokens_BT: Tensor, window: int) -> Tensor:
        """Return the ids [B, T, W] of each token and of those before it, the current one last; -1 where none exists."""
        tokens_BT1 = tokens_BT.unsqueeze(-1)
        if window == 1:
            return tokens_BT1
        rows_SBT1 = self.rows("ids", tokens_BT1, range(window - 1, 0, -1), fill=-1)
        return torch.cat((*rows_SBT1, tokens_BT1), -1)

    def rows(self, slot: Hashable, x_BTC: Tensor, steps: Sequence[int], fill: int = 0) -> Tensor:
        """Return the rows of earlier tokens.

        Args:
            slot: Identifies the sequence in the cache.
            x_BTC: One row per token of the call.
            steps: Distances to the earlier tokens, one at least; 0 stands for the token itself.
            fill: The value where the document has no such token.

        Returns:
            For each number of steps, the row of the token that many positions before each token, [S, B, T, C].
        """
        last, tokens = max(steps), x_BTC.shape[1]
        x_BLC = x_BTC if self.cache is None or not last else self.cache.remember(slot, x_BTC, last)
        rows_SBTC = _shifted(F.pad(x_BLC, (0, 0, last, 0), value=fill), steps, tokens)
        # The rows of other documents and of padding are filled, in the copy that `_shifted` has made.
        if self.segments_BT is not None:
            earlier_SBT = _shifted(F.pad(self.segments_BT, (last, 0), value=-1), steps, tokens)
            rows_SBTC.masked_fill_((earlier_SBT != self.segments_BT).unsqueeze(-1), fill)
        if self.pad_B is not None:
            position_L = torch.arange(self.past - last, self.past + tokens, device=x_BTC.device)
            position_S1T = _shifted(position_L.unsqueeze(0), steps, tokens)
            rows_SBTC.masked_fill_((position_S1T < self.pad_B[:, None]).unsqueeze(-1), fill)
        return rows_SBTC


def _shifted(x_BL: Tensor, steps: Sequence[int], tokens: int) -> Tensor:
    """Return copies of the last `tokens` entries along L, shifted back by each number of steps, [S, B, T, ...]."""
    end = x_BL.shape[1]
    return torch.stack([x_BL[:, end - tokens - step : end - step] for step in steps])
