"""Families from outside the package: a file given by path, or an installed package's entry point.

A file registers its families as it is read. It is known by its content: read twice, it registers once, and the
content's hash goes into the identity of every cell of its families.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from suite.errors import UserError
from suite.models import registry
from suite.models.accounting import account_of, cost_of, meta_model
from suite.models.registry import ModelConfig
from suite.models.transformer import Block, Transformer, build
from suite.plan.compiler import without_compiler

ENTRY_POINTS = "next_parameter.baselines"
"""The group of entry points whose modules are read as baselines."""
TOKENS = 8
AHEAD = 97
"""Tokens of a row in which a look ahead is looked for."""
MANY_TOKENS = 1024
UNCOUNTED = 1.1
"""Matrix products over those that are counted, up to which they are let pass: experts are filled to whole numbers."""
SMALL = 20_000_000
"""Parameters of a model that may be built for a check."""
FORESIGHT = 1e-3
"""Standard deviations of the logits that later tokens may move them by: other shapes of products round otherwise."""


def load(path: Path, where: str = "--baseline") -> list[str]:
    """Read a baseline's file; gives the names of its families. Raises UserError naming the file."""
    try:
        source = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{where}: got {str(path)!r}: {error.strerror}, allowed: a Python file") from None
    known = [name for name in registry.families() if registry.family(name).source == source]
    if known:
        return known
    before = registry.families()
    try:
        _execute(path, source)
    except (Exception, SystemExit) as error:
        registry.unregister(set(registry.families()) - set(before))
        raise UserError(f"{where} {path}: {_told(error, path)}") from None
    added = [name for name in registry.families() if name not in before]
    if not added:
        raise UserError(f"{where} {path}: registers no family, allowed: a file that calls registry.register")
    for name in added:
        registry.set_origin(name, source, path)
    return added


def load_all(paths: Iterable[Path] = ()) -> None:
    """Read the baselines of installed packages, then those of these files. Raises UserError."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(entry.value)
        if spec is None or spec.origin is None:
            raise UserError(f"entry point {entry.name}: got {entry.value!r}, allowed: a module that is installed")
        load(Path(spec.origin), f"entry point {entry.name}")
    for path in paths:
        load(path)


def check(config: ModelConfig) -> None:
    """Raise UserError, by name, for modules that give another shape or dtype, leave parameters or products uncounted.

    Run on the meta device, and a small model on the CPU: there it may not see tokens that come later (in evaluation
    mode).
    """
    path = registry.family(config.family).path
    assert path is not None, f"{config.family} comes from no file"
    try:
        model = meta_model(config, config.size.vocab_size or TOKENS)
        account_of(model, TOKENS)
        with without_compiler():
            by_shape = _runs(model)
        if sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
            small = build(config, model.vocab_size, seed=0)
            if _runs(small) or not by_shape:
                _refuse_foresight(small)
    except Exception as error:
        raise UserError(f"{path}: family {config.family}: {_told(error, path)}") from None


def _told(error: BaseException, path: Path) -> str:
    """The error in one line; with its kind and the line of the baseline's file where that is what raised it."""
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"line {error.lineno or 1}: {error.msg}, allowed: Python"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f"line {lines[-1]}: {type(error).__name__}: {said}" if lines else said


def needs_values(error: RuntimeError) -> bool:
    """Whether an operation failed because tensors on the meta device have no values."""
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower()


def _runs(model: Transformer) -> bool:
    """Whether the model runs on its device, where it is checked; not if that has no values or no such operation."""
    try:
        _run(model)
        _refuse_uncounted_products(model)
    except RuntimeError as error:
        if not needs_values(error):
            raise
        return False
    return True


def _run(model: Transformer) -> None:
    """Two rows through the model in evaluation mode, every feed-forward's result checked."""
    tokens_BT = torch.zeros(2, TOKENS, dtype=torch.int64, device=model.norm.weight.device)
    for index, block in enumerate(cast(list[Block], list(model.layers))):
        block.feed_forward.register_forward_hook(_result_check(index))
    with torch.no_grad():
        model.eval()(tokens_BT)


@torch.no_grad()
def _refuse_uncounted_products(model: Transformer) -> None:
    """ValueError where a feed-forward's matrix products are more than its cost() counts.

    Over many tokens, so that experts of a whole number of them count as they would in training.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports sympy, which most commands do without

    tokens_BT = torch.zeros(1, MANY_TOKENS, dtype=torch.int64, device=model.norm.weight.device)
    with FlopCounterMode(display=False) as counter:
        model.eval()(tokens_BT)
    for index, block in enumerate(cast(list[Block], list(model.layers))):
        name = f"layers.{index}.feed_forward"
        made = sum(counter.get_flop_counts().get(f"Transformer.{name}", {}).values()) / 2 / MANY_TOKENS
        counted = sum(cost_of(name, block.feed_forward).macs.values())
        if made > UNCOUNTED * counted:
            module = type(block.feed_forward).__name__
            raise ValueError(
                f"{name} ({module}): cost() counts {counted:,.0f} multiply-adds a token, "
                f"allowed: the {made:,.0f} of its matrix products"
            )


@torch.no_grad()
def _refuse_foresight(model: Transformer) -> None:
    """ValueError if what follows a token changes its logits, with weights that hide nothing by being zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.05, generator=generator))
    tokens_BT = torch.randint(model.vocab_size, (2, AHEAD), generator=generator)
    other_BT = tokens_BT.clone()
    first = AHEAD // 3
    other_BT[:, first:] = (tokens_BT[:, first:] + 1) % model.vocab_size
    one_BTV, other_BTV = (model.eval()(tokens)[:, :first] for tokens in (tokens_BT, other_BT))
    change = float((one_BTV - other_BTV).abs().max() / one_BTV.std())
    if not change < FORESIGHT:
        raise ValueError(
            f"tokens that come later change a token's logits by {change:.2g} standard deviations, "
            "allowed: none (in evaluation mode)"
        )


def _result_check(layer: int) -> Callable[..., None]:
    def look(module: nn.Module, given: tuple[Tensor, ...], result: object) -> None:
        wanted = _described(given[0])
        if _described(result) != wanted:
            name = f"layers.{layer}.feed_forward ({type(module).__name__})"
            raise ValueError(f"{name}: forward gives {_described(result)} for {wanted}, allowed: what it is given")

    return look


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _execute(path: Path, source: str) -> None:
    spec = importlib.util.spec_from_file_location(f"baseline_{source[:12]}", path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file, allowed: a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        spec.loader.exec_module(module)
