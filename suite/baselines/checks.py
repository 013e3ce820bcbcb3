"""Checks a family from outside the package before anything is trained.

Its modules must preserve shape and dtype, and must count all of their parameters and matrix products. In evaluation
mode they must not use later tokens.

Shapes: B rows, T tokens per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from suite.baselines.loading import error_line
from suite.errors import UserError
from suite.models import registry
from suite.models.accounting import account_of, cost_of, meta_model, needs_values
from suite.models.initial_weights import build
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer

TOKENS = 8
"""Tokens per row when shapes are checked, and the vocabulary size for bases that define none."""
CAUSALITY_TOKENS = 97
"""Tokens per row when causality is checked."""
PRODUCT_TOKENS = 1024
"""Tokens per row when matrix products are counted."""
PRODUCT_TOLERANCE = 1.1
"""Largest ratio of measured to counted matrix products: experts are padded to whole tokens."""
MAX_BUILT_PARAMETERS = 20_000_000
"""Largest model that is built on the CPU for the checks that need values."""
CAUSALITY_TOLERANCE = 1e-3
"""Largest change of earlier logits, in their standard deviations; matrix products of other shapes round differently."""


def check(config: ModelConfig) -> None:
    """Check the family of a configuration that comes from a baseline's file.

    The model runs on the meta device. A small one also runs on the CPU, where causality is checked.

    Raises:
        UserError: A module changes the shape or dtype of its input, its `cost()` omits parameters or matrix products,
            logits depend on later tokens, or its code raises. The message names the file, the family and the module.
    """
    path = registry.family(config.family).path
    assert path is not None, f"{config.family} is not from a baseline's file"
    try:
        model = meta_model(config, config.size.vocab_size or TOKENS)
        account_of(model, TOKENS)
        passed_on_meta = _check_shapes_and_products(model)
        if sum(parameter.numel() for parameter in model.parameters()) <= MAX_BUILT_PARAMETERS:
            built = build(config, model.vocab_size, seed=0)
            if _check_shapes_and_products(built) or not passed_on_meta:
                _check_causality(built)
    except Exception as error:
        raise UserError(f"{path}: family {config.family}: {error_line(error, path)}") from None


def _check_shapes_and_products(model: Transformer) -> bool:
    """Check shapes and products; return False if the device cannot run the model, for lack of values or an operator."""
    try:
        _check_shapes(model)
        _check_products(model)
    except RuntimeError as error:
        if not needs_values(error):
            raise
        return False
    return True


def _check_shapes(model: Transformer) -> None:
    """Run two rows in evaluation mode and check the result of every module of the family."""
    tokens_BT = torch.zeros(2, TOKENS, dtype=torch.int64, device=model.norm.weight.device)
    values = model.size.kv_heads * model.size.head_dim
    for name, module in model.attached().items():
        module.register_forward_hook(_shape_check(name, values if name.endswith("attention_values") else None))
    with torch.no_grad():
        model.eval()(tokens_BT)


def _shape_check(name: str, width: int | None) -> Callable[..., None]:
    """Return a forward hook that raises ValueError if a module's result has a wrong shape or dtype.

    Args:
        name: The module's name in the model.
        width: The columns of the result; None: those of the input.
    """

    def check_result(module: nn.Module, inputs: tuple[Tensor, ...], result: object) -> None:
        actual, expected = _shape_and_dtype(result), _shape_and_dtype(inputs[0], width)
        if actual != expected:
            allowed = "the shape and dtype of its input" if width is None else f"{expected}, the shape of the values"
            raise ValueError(
                f"{name} ({type(module).__name__}): forward returns {actual} for {_shape_and_dtype(inputs[0])}, "
                f"allowed: {allowed}"
            )

    return check_result


def _shape_and_dtype(value: object, width: int | None = None) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = tuple(value.shape) if width is None else (*value.shape[:-1], width)
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"


@torch.no_grad()
def _check_products(model: Transformer) -> None:
    """Raise ValueError if a module of the family makes more matrix products than its `cost()` counts.

    The row is long, so that experts padded to whole numbers of tokens count as they do in training.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports sympy, which most commands do not need

    tokens_BT = torch.zeros(1, PRODUCT_TOKENS, dtype=torch.int64, device=model.norm.weight.device)
    with FlopCounterMode(display=False) as counter:
        model.eval()(tokens_BT)
    for name, module in model.attached().items():
        flops = sum(counter.get_flop_counts().get(f"Transformer.{name}", {}).values())
        measured = flops / 2 / PRODUCT_TOKENS
        counted = sum(cost_of(name, module).macs.values())
        if measured > PRODUCT_TOLERANCE * counted:
            raise ValueError(
                f"{name} ({type(module).__name__}): cost() counts {counted:,.0f} multiply-adds per token, "
                f"allowed: the {measured:,.0f} of its matrix products"
            )


@torch.no_grad()
def _check_causality(model: Transformer) -> None:
    """Raise ValueError if later tokens change earlier logits; weights are perturbed so that zeros do not hide it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.05, generator=generator))
    tokens_BT = torch.randint(model.vocab_size, (2, CAUSALITY_TOKENS), generator=generator)
    changed_BT = tokens_BT.clone()
    first = CAUSALITY_TOKENS // 3
    changed_BT[:, first:] = (tokens_BT[:, first:] + 1) % model.vocab_size
    before_BTV, after_BTV = (model.eval()(tokens)[:, :first] for tokens in (tokens_BT, changed_BT))
    change = float((before_BTV - after_BTV).abs().max() / before_BTV.std())
    if not change < CAUSALITY_TOLERANCE:
        raise ValueError(
            f"in evaluation mode, later tokens change a token's logits by {change:.2g} standard deviations; a module "
            "must use earlier tokens only"
        )
