"""Checks a family from outside the package before anything is trained.

Its modules must preserve shape and dtype, count all of their parameters and matrix products, and pass gradients to all
parameters that are trained. In evaluation mode they must use neither later tokens nor other rows of a batch.

Shapes: B rows, T tokens per row, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from suite.baselines.loading import reported
from suite.models import registry
from suite.models.accounting import account_of, cost_of, meta_model, needs_values
from suite.models.initial_weights import build
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer

TOKENS = 8
"""Tokens per row when shapes are checked, and the vocabulary size for bases that define none."""
CAUSALITY_TOKENS = 97
"""Tokens per row when causality and gradients are checked."""
PRODUCT_TOKENS = 1024
"""Tokens per row when matrix products are counted."""
PRODUCT_TOLERANCE = 1.1
"""Largest ratio of measured to counted matrix products: experts are padded to whole tokens."""
MAX_BUILT_PARAMETERS = 20_000_000
"""Largest model that is built on the CPU for the checks that need values."""
CHANGE_TOLERANCE = 1e-3
"""Largest change of logits whose tokens did not change, in their standard deviations; shapes change the rounding."""


def check(config: ModelConfig) -> None:
    """Check the family of a configuration that comes from a baseline's file.

    The model runs on the meta device. A small one also runs on the CPU, where gradients and causality are checked.

    Raises:
        UserError: A module changes the shape or dtype of its input, its `cost()` omits parameters or matrix products,
            its `matrices` name no parameter, a trained parameter gets no gradient, logits depend on later tokens or on
            other rows, or its code raises. The message names the file, the family and the module.
    """
    assert registry.family(config.family).path is not None, f"{config.family} is not from a baseline's file"
    with reported(config.family):
        model = meta_model(config, config.size.vocab_size or TOKENS)
        account_of(model, TOKENS)
        _check_matrices(model)
        passed_on_meta = _check_shapes_and_products(model)
        if sum(parameter.numel() for parameter in model.parameters()) <= MAX_BUILT_PARAMETERS:
            built = build(config, model.vocab_size, seed=0)
            if _check_shapes_and_products(built) or not passed_on_meta:
                _check_training(built)
                _check_independence(built)


def _check_matrices(model: Transformer) -> None:
    """Raise ValueError if a module from outside the package declares a matrix that it does not have."""
    for name, attached in model.attached().items():
        for module in attached.modules():
            names = [parameter for parameter, _ in module.named_parameters()]
            unknown = set(getattr(module, "matrices", ())) - set(names)
            if unknown and not type(module).__module__.startswith("suite."):
                raise ValueError(
                    f"{name} ({type(module).__name__}): matrices: got {min(unknown)!r}, allowed: {', '.join(names)}"
                )


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


def _check_training(model: Transformer) -> None:
    """Take a training pass; raise ValueError if the loss is not finite, or a parameter of the family gets no gradient.

    A few tokens may choose few experts, so a parameter may lack a gradient if one that differs from it only in the
    numbers of its name, such as another expert's, has one.
    """
    tokens_BT = _random_tokens(model, torch.Generator().manual_seed(0))
    losses = [model.train().loss(model.hidden(tokens_BT), tokens_BT)]
    losses += [weight * value for weight, value in model.auxiliary_losses().values()]
    loss = torch.stack(losses).sum()
    if not loss.isfinite():
        raise ValueError(f"the loss at the initial weights is {loss.item()}, allowed: a finite number")
    loss.backward()
    parameters = {
        f"{name}.{path}": parameter
        for name, module in model.attached().items()
        for path, parameter in module.named_parameters()
    }
    kinds = {name: re.sub(r"\d+", "N", name) for name in parameters}
    reached = {kinds[name] for name, parameter in parameters.items() if parameter.grad is not None}
    for name, parameter in parameters.items():
        if parameter.requires_grad and kinds[name] not in reached:
            raise ValueError(f"{name}: gets no gradient; use it in forward, or set requires_grad to False")


@torch.no_grad()
def _check_independence(model: Transformer) -> None:
    """Raise ValueError if later tokens or another row change logits; perturbed weights leave no zeros to hide it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.05, generator=generator))
    tokens_BT = _random_tokens(model, generator)
    first = CAUSALITY_TOKENS // 3
    later_BT, other_BT = tokens_BT.clone(), tokens_BT.clone()
    later_BT[:, first:] = (tokens_BT[:, first:] + 1) % model.vocab_size
    other_BT[1] = (tokens_BT[1] + 1) % model.vocab_size
    logits_BTV = model.eval()(tokens_BT)
    for changed_BT, what, remedy, same in (
        (later_BT, "later tokens change a token's", "use earlier tokens only", (slice(None), slice(first))),
        (other_BT, "the other row of a batch changes a row's", "treat rows separately", (slice(1), slice(None))),
    ):
        change = float((logits_BTV - model(changed_BT))[same].abs().max() / logits_BTV.std())
        if not change < CHANGE_TOLERANCE:
            raise ValueError(
                f"in evaluation mode, {what} logits by {change:.2g} standard deviations; a module must {remedy}"
            )


def _random_tokens(model: Transformer, generator: torch.Generator) -> Tensor:
    return torch.randint(model.vocab_size, (2, CAUSALITY_TOKENS), generator=generator)
