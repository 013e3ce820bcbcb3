"""Distributions of initial values, and the random numbers of the elements of large tensors.

Elements are independent: any part of a tensor can be drawn separately.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Distribution(Protocol):
    """Independent elements of one law. A baseline may have its own."""

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`, a whole parameter of at most 2^22 elements on the CPU."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """Return the quantiles of probabilities in (0, 1), in float64; called for larger parameters, on any device."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        x.fill_(self.value)

    def quantile(self, u: Tensor) -> Tensor:
        """Return quantiles of the shape of `u`."""
        return torch.full_like(u, self.value)


@dataclass(frozen=True)
class Normal:
    """Normal with mean zero and standard deviation `std`."""

    std: float

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        x.normal_(0.0, self.std, generator=generator)

    def quantile(self, u: Tensor) -> Tensor:
        """Return quantiles of the shape of `u`."""
        return torch.special.ndtri(u).mul_(self.std)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float
    high: float

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        x.uniform_(self.low, self.high, generator=generator)

    def quantile(self, u: Tensor) -> Tensor:
        """Return quantiles of the shape of `u`."""
        return u * (self.high - self.low) + self.low


def xavier_uniform(fan_in: int, fan_out: int) -> Uniform:
    """Return the distribution of torch.nn.init.xavier_uniform_ (Glorot and Bengio 2010, eq. 16)."""
    bound: float = 3.0**0.5 * (2.0 / (fan_in + fan_out)) ** 0.5
    return Uniform(-bound, bound)


LOW_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words for each counter: Philox 4x32 with 10 rounds (Salmon et al. 2011, section 3).

    The generator is a function of its arguments alone, and integer arithmetic is exact, so its words are the same on
    every device.

    Args:
        counter: The counters' words, from the lowest, in int64 and below 2^32; shapes that broadcast.
        key: 64 bits.

    Returns:
        Words in int64, below 2^32.
    """
    a, b, c, d = counter
    low_key, high_key = key & LOW_WORD, key >> 32
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64: the sign bit is one of the product's
        a, b = (second >> 32).bitwise_and_(LOW_WORD) ^ b ^ low_key, second & LOW_WORD
        c, d = (first >> 32).bitwise_and_(LOW_WORD) ^ d ^ high_key, first & LOW_WORD
        low_key, high_key = (low_key + 0x9E3779B9) & LOW_WORD, (high_key + 0xBB67AE85) & LOW_WORD
    return a, b, c, d


def probabilities(rows_M: Tensor, columns: tuple[int, int], key: int) -> Tensor:
    """Return a uniform random number in (0, 1) for each element of a part of a matrix.

    Args:
        rows_M: [M] int64, the numbers of the part's rows.
        columns: Its first column, and the one after its last.
        key: 64 bits that identify the matrix.

    Returns:
        [M, columns] float64, multiples of 2^-33; each depends on its row, its column and the key alone.
    """
    first, last = columns
    group_G = torch.arange(first // 4, -(-last // 4), device=rows_M.device)
    row_M1 = rows_M[:, None]
    counter = (row_M1 & LOW_WORD, row_M1 >> 32, group_G & LOW_WORD, group_G >> 32)
    words_MG4 = torch.stack(torch.broadcast_tensors(*philox(counter, key)), -1)
    skipped = first % 4
    words_MD = words_MG4.flatten(1)[:, skipped : skipped + last - first]
    return words_MD.double().add_(0.5).mul_(2.0**-32)
