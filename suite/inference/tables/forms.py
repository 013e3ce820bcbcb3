"""Forms in which a row is stored: as it is, in bf16, or as codes with scales.

A form turns rows into parts, tensors with one row for each row of the table, and parts of some rows back into rows.
Scales are fp32, one per row, except in fp8. All codes are symmetric, so a zero stays a zero.

Shapes: R rows of a table, U rows of a read, D row width, B blocks of a row, L levels of a 4-bit code.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from suite.models.memory_table import RowForm
from suite.models.precision import at_least_fp32

FORMS: tuple[RowForm, ...] = get_args(RowForm)

Parts = dict[str, Tensor]
"""The tensors of a stored table by name, each with one row per row of the table."""

BLOCK = 32
"""Elements that share a scale in fp8, as in the OCP microscaling formats (version 1.0, section 5.2)."""
FP8_MAX = 448.0
"""Largest number of e4m3."""
INT4_MAX = 7
CLIPS = tuple(1 - step / 32 for step in range(17))
"""Shares of a row's largest magnitude that are tried as the largest number of int4. A search per row is that of
arXiv 1911.02079, section 3; the steps are our choice."""
ROWS_AT_ONCE = 1 << 14
NF4_TAIL = 0.5 * (31 / 32 + 29 / 30)
"""Probability up to the outermost level of NF4 (QLoRA, arXiv 2305.14314, section 3 and its released code)."""


class Form:
    """Rows as they are, in their own dtype: one part, `values`."""

    def encode(self, rows_RD: Tensor) -> Parts:
        """Return the parts of rows."""
        return {"values": rows_RD}

    def decode(self, parts: Parts, width: int) -> Tensor:
        """Return rows [U, D] of `width` D from their parts, in fp32 or wider."""
        values_UD = parts["values"]
        return values_UD.to(at_least_fp32(values_UD.dtype))

    def empty(self, rows: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Parts:
        """Return uninitialised parts of a table.

        Args:
            rows: Rows of the table.
            width: Their width.
            dtype: Their dtype before they are encoded.
            device: The device of the parts; None: the CPU.
        """
        one = self.encode(torch.zeros(1, width, dtype=dtype, device="cpu"))
        return {name: part.new_empty(rows, *part.shape[1:], device=device) for name, part in one.items()}


class BFloat16(Form):
    """Rows rounded to bf16."""

    def encode(self, rows_RD: Tensor) -> Parts:
        return {"values": rows_RD.to(torch.bfloat16)}


class Int8(Form):
    """Codes from -127 to 127, and the row's largest magnitude / 127 as its scale."""

    def encode(self, rows_RD: Tensor) -> Parts:
        rows_RD = rows_RD.float()
        scales_R1 = rows_RD.abs().amax(1, keepdim=True) / 127
        return {"codes": _divided(rows_RD, scales_R1).round().to(torch.int8), "scales": scales_R1}

    def decode(self, parts: Parts, width: int) -> Tensor:
        return parts["codes"].float() * parts["scales"]


class Int4(Form):
    """Codes from -7 to 7, two per byte; the scale of a row is that of `CLIPS` with the least squared error."""

    def encode(self, rows_RD: Tensor) -> Parts:
        rows_RD = rows_RD.float()
        largest_R1 = rows_RD.abs().amax(1, keepdim=True)
        best_R1, least_R1 = largest_R1 / INT4_MAX, torch.full_like(largest_R1, torch.inf)
        for clip in CLIPS:
            scales_R1 = largest_R1 * clip / INT4_MAX
            errors_R1 = (_int4(rows_RD, scales_R1) * scales_R1 - rows_RD).square().sum(1, keepdim=True)
            best_R1 = torch.where(errors_R1 < least_R1, scales_R1, best_R1)
            least_R1 = torch.minimum(errors_R1, least_R1)
        return {"codes": pack(_int4(rows_RD, best_R1).to(torch.int64) + INT4_MAX), "scales": best_R1}

    def decode(self, parts: Parts, width: int) -> Tensor:
        return (unpack(parts["codes"], width).float() - INT4_MAX) * parts["scales"]


class Fp8(Form):
    """e4m3 numbers; blocks of 32 share a power of two, with which the block's largest magnitude is at most 448.

    The codes are stored as bytes, and the exponents of the scales as int8 (e8m0).
    """

    def encode(self, rows_RD: Tensor) -> Parts:
        rows, width = rows_RD.shape
        blocks_RBE = F.pad(rows_RD.float(), (0, -width % BLOCK)).view(rows, -1, BLOCK)
        mantissas_RB, exponents_RB = torch.frexp(blocks_RBE.abs().amax(2) / FP8_MAX)
        exponents_RB = torch.where(mantissas_RB == 0.5, exponents_RB - 1, exponents_RB).clamp(-126, 126)
        scaled_RBE = torch.ldexp(blocks_RBE, -exponents_RB.unsqueeze(2))
        codes_RD = scaled_RBE.view(rows, -1)[:, :width].to(torch.float8_e4m3fn)
        return {"codes": codes_RD.contiguous().view(torch.uint8), "exponents": exponents_RB.to(torch.int8)}

    def decode(self, parts: Parts, width: int) -> Tensor:
        exponents_UD = parts["exponents"].repeat_interleave(BLOCK, 1)[:, :width].to(torch.int32)
        return torch.ldexp(parts["codes"].view(torch.float8_e4m3fn).float(), exponents_UD)


class NormalFloat4(Form):
    """The nearest of 16 levels at quantiles of the normal distribution, two per byte; scale: the largest magnitude."""

    def encode(self, rows_RD: Tensor) -> Parts:
        rows_RD = rows_RD.float()
        scales_R1 = rows_RD.abs().amax(1, keepdim=True)
        levels_L = nf4_levels(rows_RD.device)
        middles = (levels_L[1:] + levels_L[:-1]) / 2
        return {"codes": pack(torch.bucketize(_divided(rows_RD, scales_R1), middles)), "scales": scales_R1}

    def decode(self, parts: Parts, width: int) -> Tensor:
        levels_L = nf4_levels(parts["codes"].device)
        return levels_L[unpack(parts["codes"], width).long()] * parts["scales"]


_FORMS: dict[RowForm, Form] = {
    "bf16": BFloat16(),
    "int8": Int8(),
    "int4": Int4(),
    "fp8": Fp8(),
    "nf4": NormalFloat4(),
}


def form_of(name: RowForm | None) -> Form:
    """Return the form of that name; None: rows as they are."""
    return Form() if name is None else _FORMS[name]


def row_bytes(form: RowForm | None, width: int, dtype: torch.dtype) -> int:
    """Return the bytes of a row in a form.

    Args:
        form: The form; None: rows as they are.
        width: The row's width.
        dtype: Its dtype before it is encoded.
    """
    return sum(part.nbytes for part in form_of(form).empty(1, width, dtype).values())


def encode_table(form: Form, rows_RD: Tensor) -> Parts:
    """Return the parts of a whole table, encoded a few rows at a time, so that temporaries stay small."""
    pieces = [form.encode(piece_RD) for piece_RD in rows_RD.split(ROWS_AT_ONCE)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def pack(codes_RD: Tensor) -> Tensor:
    """Return codes from 0 to 15 as bytes, [R, ceil(D / 2)]; the first of two is in the low half."""
    codes_RD = F.pad(codes_RD, (0, codes_RD.shape[1] % 2)).to(torch.uint8)
    return codes_RD[:, ::2] | (codes_RD[:, 1::2] << 4)


def unpack(bytes_UX: Tensor, width: int) -> Tensor:
    """Return the codes [U, width] of bytes, as `pack` made them."""
    return torch.stack((bytes_UX & 15, bytes_UX >> 4), 2).flatten(1)[:, :width]


def nf4_levels(device: torch.device) -> Tensor:
    """Return the 16 levels of NF4, ascending from -1 to 1: 7 below zero, zero, and 8 above."""
    below, above = (
        torch.special.ndtri(torch.linspace(NF4_TAIL, 0.5, count, dtype=torch.float64)[:-1]) for count in (8, 9)
    )
    levels = torch.cat((-below, below.new_zeros(1), above.flip(0))) / above[0]
    return levels.float().to(device)


def _divided(rows_RD: Tensor, scales_R1: Tensor) -> Tensor:
    """Return rows divided by their scales; a row of zeros, whose scale is 0, stays zero."""
    return rows_RD / torch.where(scales_R1 == 0, 1.0, scales_R1)


def _int4(rows_RD: Tensor, scales_R1: Tensor) -> Tensor:
    return _divided(rows_RD, scales_R1).round().clamp(-INT4_MAX, INT4_MAX)
