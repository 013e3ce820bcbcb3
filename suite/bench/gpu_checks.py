"""Parts of `suite.bench.gpu` that need torch, triton and numpy alone: kernels against the reference and other packages.

Shapes: R table rows, D width, N tokens, S rows read per token, M heads, W width of a half key, n half keys, K = top_k.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench.cases import dtype_name, seconds_of
from kernels.bench.main import copy_bandwidth
from kernels.dispatch import module
from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.product_key import product_key
from kernels.rotary import rotate
from kernels.row_adamw import RowAdamW

Row = dict[str, object]
ROUNDS = 10
OPTIONS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.float32, {"row_second_moment": True}),
    (torch.bfloat16, {"low_precision": "master"}),
    (torch.bfloat16, {"low_precision": "stochastic"}),
)
"""Dtypes of a table and options of its optimizer, each of which is checked on both paths, at one width."""


def rows(device: str, rehearsal: bool) -> Iterator[Row]:
    """Compare each operator with the reference; `error` is the largest difference over the largest value."""
    widths = (16,) if rehearsal else (768, 2048, 4096)
    for width, dtype in product(widths, (torch.float32, torch.bfloat16)):
        allowed = 1e-5 if dtype == torch.float32 else 2e-2
        shape = f"width {width}, {dtype_name(dtype)}"
        for operator, both in (("bag", _bags), ("row_adamw", _updates), ("rotary", _rotations)):
            yield compared(operator, shape, both(width, dtype, device, rehearsal), allowed)
    width = widths[0]
    for (dtype, options), path in product(OPTIONS, ("replay", "sweep")):
        yield _optimized(width, dtype, {**options, "path": path}, device, rehearsal)
    for dtype, passes in product(
        (torch.float32, torch.bfloat16), (("few",), ("few", "few"), ("most",), ("few", "most"))
    ):
        shape = f"width {width}, {dtype_name(dtype)}, lookups of {' and '.join(passes)} rows"
        yield compared("row_sums", shape, _row_sums(width, dtype, passes, device, rehearsal), 1e-5)
    for width, half_keys in ((8, 40),) if rehearsal else product((128, 512, 1024), (1024, 8192)):
        yield from _searches(width, half_keys, device, 4 if rehearsal else 512)


def compared(operator: str, shape: str, both: tuple[list[Tensor], list[Tensor]], allowed: float) -> Row:
    """Return a row of what an operator computed next to what was expected.

    Args:
        operator: The operator.
        shape: Its shape and options in words.
        both: Its results, and those expected.
        allowed: The largest error that is not wrong.
    """
    errors = [
        float((ours - theirs).double().abs().max() / theirs.double().abs().max().clamp(min=1e-30))
        for ours, theirs in zip(*both, strict=True)
    ]
    return {"operator": operator, "shape": shape, "error": max(errors), "correct": max(errors) <= allowed}


def _bags(width: int, dtype: torch.dtype, device: str, rehearsal: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and gradients of both; one row is read by many tokens."""
    tokens, read, table_rows = (6, 8, 40) if rehearsal else (512, 128, 1 << 14)
    generator = torch.Generator(device).manual_seed(0)
    table_RD = torch.randn(table_rows, width, generator=generator, device=device).to(dtype)
    indices_NS = torch.randint(table_rows, (tokens, read), generator=generator, device=device)
    indices_NS[:, 0] = 3
    factors_NS = torch.randn(tokens, read, generator=generator, device=device)
    grad_ND = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    results = []
    for backend in ("triton", "torch"):
        sink, weights_NS = RowGradients(table_RD), factors_NS.clone().requires_grad_()
        out_ND = embedding_bag(table_RD.clone().requires_grad_(), indices_NS, weights_NS, sink, backend)
        out_ND.backward(grad_ND)
        assert weights_NS.grad is not None
        results.append([out_ND.detach(), weights_NS.grad, sink.merged()[1]])
    return results[0], results[1]


def _updates(width: int, dtype: torch.dtype, device: str, rehearsal: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return tables after steps with replays of missed ones, updates of few rows and a flush."""
    table_rows = 40 if rehearsal else 1 << 12
    start_RD = torch.randn(table_rows, width, generator=torch.Generator(device).manual_seed(1), device=device)
    results = []
    for backend in ("triton", "torch"):
        generator, table_RD = torch.Generator(device).manual_seed(2), start_RD.to(dtype, copy=True)
        sink = RowGradients(table_RD)
        adamw = RowAdamW(table_RD, sink, weight_decay=0.1, path="replay", backend=backend)
        for _ in range(4):
            read_U = torch.randint(table_rows, (table_rows // 8,), generator=generator, device=device).unique()
            adamw.before_read(read_U)
            sink.add(read_U, torch.randn(len(read_U), width, generator=generator, device=device))
            adamw.step(1e-2)
        adamw.flush()
        results.append([table_RD, adamw.state.mean_RD, adamw.state.square_RX])
    return results[0], results[1]


def _optimized(width: int, dtype: torch.dtype, options: dict[str, Any], device: str, rehearsal: bool) -> Row:
    """Compare a table and its moments after steps with the reference in float64, for any options of the optimizer.

    Rows have gradients in compact form at the first steps, and in a buffer of the whole table at the last ones; they
    are integers, so that no rounding of a sum can turn the sign of an update. Stochastic rounding is compared with the
    reference in the same dtype, which draws the same noise: `error` is then the share of values that differ.
    """
    is_noisy = options.get("low_precision") == "stochastic"
    table_rows = 24 if rehearsal else 1 << 12
    few, most = max(1, table_rows // 32), table_rows // 8
    start_RD = torch.randn(table_rows, width, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    ours_RD, theirs_RD = start_RD.clone(), start_RD.to(dtype if is_noisy else torch.float64, copy=True)
    kept = options if is_noisy else {name: value for name, value in options.items() if name != "low_precision"}
    ours, theirs = (
        RowAdamW(table_RD, RowGradients(table_RD), weight_decay=0.1, backend=backend, **chosen)
        for table_RD, backend, chosen in ((ours_RD, "triton", options), (theirs_RD, "torch", kept))
    )
    bags, generator = module("embedding_bag", "triton"), torch.Generator(device).manual_seed(2)
    for tokens in (few, few, most, most):
        indices_NS = torch.randint(table_rows, (tokens, 8), generator=generator, device=device)
        source_ND = torch.randint(-8, 9, (tokens, width), generator=generator, device=device).float()
        weights_NS = torch.randint(-2, 3, (tokens, 8), generator=generator, device=device).float()
        rows_U, sums_UD = _expected_sums(table_rows, [(source_ND, indices_NS, weights_NS)])
        ours.before_read(indices_NS)
        ours.gradients.add_row_sums(source_ND, weights_NS, bags.group_by_row(indices_NS, table_rows), bags)
        theirs.before_read(rows_U)
        theirs.gradients.add(rows_U, sums_UD.to(theirs.gradients.dtype))
        for adamw in (ours, theirs):
            adamw.gradients.scale_(0.5)
            adamw.step(1e-2)
    ours.flush()
    theirs.flush()
    results = [ours.state.values_RD, ours.state.mean_RD, ours.state.square_RX]
    expected = [theirs.state.values_RD, theirs.state.mean_RD, theirs.state.square_RX]
    shape = f"width {width}, {dtype_name(dtype)}, " + ", ".join(
        name.replace("_", " ") if value is True else str(value) for name, value in options.items()
    )
    if is_noisy:
        differ = float(results[0].ne(expected[0]).double().mean())
        moved = float(expected[0].ne(start_RD).double().mean())
        return {"operator": "row_adamw", "shape": shape, "error": differ, "correct": differ < 1e-3 and moved > 0.5}
    row = compared("row_adamw", shape, (results, expected), 1e-5)
    is_published = torch.equal(ours_RD, ours.state.values_RD.to(dtype))
    return row if is_published else {**row, "correct": False, "note": "the table is not its master copy, rounded"}


def _row_sums(
    width: int, dtype: torch.dtype, passes: tuple[str, ...], device: str, rehearsal: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the summed gradients of all rows, flags of those that were read, and the norm, after backward passes.

    Passes that read few rows leave compact sums, which are merged; others add to a buffer of the whole table, to which
    earlier compact sums are moved. Half of the lookups read one row.
    """
    table_rows, read = (64, 4) if rehearsal else (1 << 14, 128)
    generator, bags = torch.Generator(device).manual_seed(5), module("embedding_bag", "triton")
    table_RD = torch.empty(table_rows, width, dtype=dtype, device=device)
    sink, batches = RowGradients(table_RD), []
    for rows_read in passes:
        tokens = table_rows // read // 8 if rows_read == "few" else table_rows // read
        indices_NS = torch.randint(table_rows, (tokens, read), generator=generator, device=device)
        indices_NS[:, ::2] = 3
        source_ND = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
        weights_NS = torch.randn(tokens, read, generator=generator, device=device)
        sink.add_row_sums(source_ND, weights_NS, bags.group_by_row(indices_NS, table_rows), bags)
        batches.append((source_ND, indices_NS, weights_NS))
    rows_U, expected_UD = _expected_sums(table_rows, batches)
    placed, expected_RD = sink.placed(), torch.zeros(table_rows, width, dtype=torch.float64, device=device)
    assert (placed.rows_P is None) == ("most" in passes), "the form of the sums follows from the number of lookups"
    sums_RD = placed.sums
    if placed.rows_P is not None:
        room_RD = torch.zeros(table_rows + 1, width, dtype=sums_RD.dtype, device=device)
        sums_RD = room_RD.index_add_(0, placed.rows_P, sums_RD)[:-1]
    is_read_R = torch.zeros(table_rows, device=device).index_fill_(0, rows_U, 1)
    expected_RD[rows_U] = expected_UD
    return [sums_RD, sink.is_read().float(), sink.norm()], [expected_RD, is_read_R, expected_RD.norm()]


def _expected_sums(table_rows: int, batches: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the rows that were read, ascending, and their sums in float64.

    Args:
        table_rows: Rows of the table.
        batches: Sources [N, D], indices [N, S] and weights [N, S] of each backward pass.
    """
    device, width = batches[0][0].device, batches[0][0].shape[1]
    sums_RD = torch.zeros(table_rows, width, dtype=torch.float64, device=device)
    for source_ND, indices_NS, weights_NS in batches:
        for slot in range(indices_NS.shape[1]):  # one product of all would need bytes of the lookups times the width
            sums_RD.index_add_(0, indices_NS[:, slot], source_ND.double() * weights_NS[:, slot, None].double())
    rows_U = torch.cat([indices_NS.flatten() for _, indices_NS, _ in batches]).unique()
    return rows_U, sums_RD[rows_U]


def _rotations(width: int, dtype: torch.dtype, device: str, rehearsal: bool) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(3)
    x_BTC = torch.randn(2, 5, width, generator=generator, device=device).to(dtype)
    angle_TI = torch.randn(5, 8, generator=generator, device=device)
    ours, theirs = (rotate(x_BTC, angle_TI.cos(), angle_TI.sin(), backend) for backend in ("triton", "torch"))
    return [ours], [theirs]


def _searches(width: int, half_keys: int, device: str, tokens: int) -> Iterator[Row]:
    """Compare rows and scores; rows may differ where scores tie up to rounding."""
    q_NM2W, keys_M2nW = _keys(width, half_keys, tokens, device)
    (rows_MNK, scores_MNK), (_, expected_MNK) = (
        product_key(q_NM2W, keys_M2nW, 8, name) for name in ("triton", "torch")
    )
    yield compared("search", f"W {width}, n {half_keys}: scores", ([scores_MNK], [expected_MNK]), 1e-4)
    halves_M2NK = torch.stack((rows_MNK // half_keys, rows_MNK % half_keys), 1)
    half_scores_M2Nn = q_NM2W.float().permute(1, 2, 0, 3) @ keys_M2nW.mT
    of_rows_MNK = half_scores_M2Nn.gather(-1, halves_M2NK).sum(1)
    yield compared("search", f"W {width}, n {half_keys}: rows", ([of_rows_MNK], [expected_MNK]), 1e-4)


def _keys(width: int, half_keys: int, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(4)
    q_NM2W = torch.randn(tokens, 2, 2, width, generator=generator, device=device).bfloat16()
    return q_NM2W, torch.randn(2, 2, half_keys, width, generator=generator, device=device)


def search_rows(device: str, rehearsal: bool) -> Iterator[Row]:
    """Time the search of 32 rows per head next to the same half scores with torch.topk."""
    shapes = ((8, 40),) if rehearsal else product((128, 512, 1024), (1024, 4096, 8192))
    top_k = 4 if rehearsal else 32
    for width, half_keys in shapes:
        q_NM2W, keys_M2nW = _keys(width, half_keys, 4 if rehearsal else 16_384, device)

        def plain(q_NM2W: Tensor = q_NM2W, keys_M2nW: Tensor = keys_M2nW) -> None:
            for part in q_NM2W.split(2048):
                (part.permute(1, 2, 0, 3) @ keys_M2nW.bfloat16().mT).topk(top_k)

        def ours(q_NM2W: Tensor = q_NM2W, keys_M2nW: Tensor = keys_M2nW) -> None:
            product_key(q_NM2W, keys_M2nW, top_k, "triton")

        for contender, work in (("ours", ours), ("product and topk, without pairs", plain)):
            yield {"contender": contender, "W": width, "n": half_keys, "ms": _milliseconds(work, device, rehearsal)}


def other_rows(device: str, rehearsal: bool) -> Iterator[Row]:
    """Time the forward pass of weighted bags of bf16 rows."""
    table_rows, width, tokens, read = (64, 16, 4, 4) if rehearsal else (1 << 20, 2048, 16_384, 128)
    table_RD = torch.zeros(table_rows, width, dtype=torch.bfloat16, device=device)
    indices_NS = torch.randint(table_rows, (tokens, read), device=device)
    weights_NS = torch.rand(tokens, read, device=device)
    moved, copy = tokens * read * width * 2, copy_bandwidth(device)
    contenders: dict[str, Callable[[], object] | None] = {
        "ours": lambda: embedding_bag(table_RD, indices_NS, weights_NS, RowGradients(table_RD), "triton"),
        "F.embedding_bag": lambda: F.embedding_bag(
            indices_NS, table_RD, per_sample_weights=weights_NS.bfloat16(), mode="sum"
        ),
        "fbgemm_gpu": _fbgemm(table_RD, indices_NS, weights_NS),
        "eai-sparsify (Triton)": _sparsify(table_RD, indices_NS, weights_NS),
    }
    for contender, work in contenders.items():
        if work is None:
            yield {"contender": contender, "note": "not installed"}
            continue
        milliseconds = _milliseconds(work, device, rehearsal)
        share = moved / (milliseconds / 1e3) / copy
        yield {"contender": contender, "ms": milliseconds, "copy_share": round(share, 3)}


def _fbgemm(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor) -> Callable[[], object] | None:
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return None
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (  # type: ignore[import-not-found]
        EmbeddingLocation,
        IntNBitTableBatchedEmbeddingBagsCodegen,
        SparseType,
    )

    table = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", *table_RD.shape, SparseType.FP16, EmbeddingLocation.DEVICE)], device=table_RD.device
    )
    table.fill_random_weights()
    offsets = torch.arange(0, indices_NS.numel() + 1, indices_NS.shape[1], dtype=torch.int32, device=table_RD.device)
    return lambda: table(indices_NS.flatten().int(), offsets, weights_NS.flatten())


def _sparsify(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor) -> Callable[[], object] | None:
    """Return the Triton kernel of the released code of "Memory Layers at Scale", which eai-sparsify contains."""
    try:
        kernel = importlib.import_module("sparsify.xformers").embedding_bag_triton
    except ImportError:
        return None
    return lambda: kernel(indices_NS, table_RD, weights_NS)


def _milliseconds(work: Callable[[], object], device: str, rehearsal: bool) -> float:
    """Return the median time of a call, after one that compiles."""
    work()
    times = [seconds_of(work, device) for _ in range(1 if rehearsal else ROUNDS)]
    return round(1e3 * statistics.median(times), 3)
