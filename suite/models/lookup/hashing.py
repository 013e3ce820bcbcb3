"""Rows of n-grams, by one of two hashes of the last ids, the current one (x_0) first.

`NgramHash`: (x_0 m_0) ^ (x_1 m_1) ^ ..., modulo a head's rows (Engram, arXiv 2601.07372, section 2, and its code).
`PolynomialHash`: x_0 + x_1 V + ..., modulo a table's rows (Over-Encoding, arXiv 2501.16975; LongCat, arXiv 2601.21204).

Shapes: B rows, T tokens, V vocabulary, N highest order, H = (N - 1) * heads per order (or tables per order).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

LAYER_SEED = 10007
"""Distance of the seeds of consecutive layers in the published code."""


class RowHash(nn.Module):
    """The rows of the n-grams that end at each token: one per order and head, in one table that holds all heads.

    The buffers are part of a checkpoint, so a trained model needs neither its tokenizer nor a random generator.

    Args:
        vocab_size: Entries of the vocabulary (V).
        moduli: Rows of each order and head, orders ascending.
        orders: The highest order (N); the lowest is 2.
    """

    multipliers_HN: Tensor
    moduli_H: Tensor
    first_H: Tensor

    def __init__(self, vocab_size: int, moduli: list[int], orders: int) -> None:
        super().__init__()
        self.vocab_size, self.moduli, self.orders = vocab_size, moduli, orders
        self.register_buffer("multipliers_HN", torch.empty(len(moduli), orders, dtype=torch.int64))
        self.register_buffer("moduli_H", torch.empty(len(moduli), dtype=torch.int64))
        self.register_buffer("first_H", torch.empty(len(moduli), dtype=torch.int64))

    def set_multipliers(self, multipliers_HN: Tensor) -> None:
        """Set all buffers; a multiplier of an id before the n-gram becomes zero, which leaves the id out."""
        heads = len(self.moduli) // (self.orders - 1)
        order_H1 = torch.arange(2, self.orders + 1).repeat_interleave(heads).unsqueeze(1)
        self.multipliers_HN.copy_(torch.where(torch.arange(self.orders) < order_H1, multipliers_HN, 0))
        self.moduli_H.copy_(torch.tensor(self.moduli))
        self.first_H.copy_(torch.tensor([0, *itertools.accumulate(self.moduli[:-1])]))

    def products(self, x_BTN: Tensor) -> Iterator[Tensor]:
        """Yield the products [B, T, H] of each id and its multiplier, the current id first."""
        for back in range(self.orders):
            yield x_BTN[..., -1 - back, None] * self.multipliers_HN[:, back]

    def rows(self, hash_BTH: Tensor) -> Tensor:
        """Return the rows [B, T, H] of the hashes."""
        return hash_BTH % self.moduli_H + self.first_H


class NgramHash(RowHash):
    """Multiplicative-XOR hashes of canonical ids.

    Args:
        vocab_size: Entries of the vocabulary (V).
        moduli: Rows of each order and head, orders ascending.
        orders: The highest order (N); the lowest is 2.
        seed: Seed of the multipliers.
        shared_mix: Whether all heads of an order share their multipliers and differ in the modulus only, as in the
            published code.
        canonical: Whether ids are mapped to canonical ones.
    """

    canonical_ids: Tensor

    def __init__(
        self, vocab_size: int, moduli: list[int], orders: int, seed: int, shared_mix: bool, canonical: bool
    ) -> None:
        super().__init__(vocab_size, moduli, orders)
        self.seed, self.shared_mix, self.canonical = seed, shared_mix, canonical
        self.register_buffer("canonical_ids", torch.empty(vocab_size + 1, dtype=torch.int64))

    def reset_buffers(self) -> None:
        """Set all buffers; every token has a canonical id of its own."""
        self.set_canonical_ids(list(range(self.vocab_size)))

    def set_canonical_ids(self, canonical_ids: list[int]) -> None:
        """Set all buffers, given the canonical id of every token.

        The last canonical id, at index -1, stands for a token that the document does not have. It is an id of its own;
        the published code has the id of the padding token there.
        """
        ids = canonical_ids if self.canonical else list(range(len(canonical_ids)))
        count = max(ids) + 1
        self.canonical_ids.copy_(torch.tensor([*ids, count]))
        multipliers = odd_multipliers(self.seed, count, len(self.moduli), self.orders, self.shared_mix)
        self.set_multipliers(torch.from_numpy(multipliers))

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Change the number of tokens; each new token gets a canonical id of its own."""
        missing = self.canonical_ids[-1:]
        present = self.canonical_ids[:-1][:vocab_size]
        new = missing + torch.arange(1, vocab_size - len(present) + 1, device=missing.device)
        self.canonical_ids = torch.cat((present, new, missing))

    def forward(self, ids_BTN: Tensor) -> Tensor:
        """Return the row of each order and head, [B, T, H]; a missing id is -1."""
        first_BTH, *others = self.products(self.canonical_ids[ids_BTN])
        for product_BTH in others:
            first_BTH = first_BTH ^ product_BTH
        return self.rows(first_BTH)


class PolynomialHash(RowHash):
    """Base-V numbers of the last ids; the current id is the last digit. A missing id counts as zero (Over-Encoding)."""

    def reset_buffers(self) -> None:
        """Set all buffers. Powers are reduced by the modulus, so that no product leaves 63 bits."""
        powers = [[pow(self.vocab_size, back, rows) for back in range(self.orders)] for rows in self.moduli]
        self.set_multipliers(torch.tensor(powers))

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Refuse, since the row counts of a trained model depend on its vocabulary."""
        raise ValueError(f"vocabulary: got {vocab_size} entries, allowed: {self.vocab_size}, which rows depend on")

    def forward(self, ids_BTN: Tensor) -> Tensor:
        """Return the row of each table, [B, T, H]; a missing id is -1."""
        first_BTH, *others = self.products(ids_BTN.clamp_min(0))
        for product_BTH in others:
            first_BTH = first_BTH + product_BTH
        return self.rows(first_BTH)


def odd_multipliers(seed: int, ids: int, heads: int, orders: int, shared: bool) -> np.ndarray:
    """Draw odd multipliers so small that a product with an id stays below 2^63.

    Args:
        seed: Seed of numpy's generator.
        ids: Number of ids.
        heads: Hash heads of all orders (H).
        orders: Multipliers per head (N).
        shared: Whether all heads have the same.

    Returns:
        The multipliers [H, N], int64.
    """
    half = (2**63 - 1) // ids // 2
    generator = np.random.default_rng(seed)
    if shared:
        return np.tile(generator.integers(0, half, orders, dtype=np.int64) * 2 + 1, (heads, 1))
    return generator.integers(0, half, (heads, orders), dtype=np.int64) * 2 + 1


def primes_from(start: int) -> Iterator[int]:
    """Yield the primes of at least `start`, ascending."""
    return (number for number in itertools.count(max(2, start)) if is_prime(number))


def is_prime(number: int) -> bool:
    """Return whether a number is prime, by trial division."""
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
