"""Initial weights: every parameter is drawn from a generator of its own, seeded by (seed, name)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from suite.models.registry import ModelConfig
from suite.models.sizes import Size
from suite.models.transformer import Transformer

CanonicalIds = Callable[[], list[int]]
"""Returns the canonical id of every token; called for models that hash them."""


def build(config: ModelConfig, vocab_size: int, seed: int, canonical_ids: CanonicalIds | None = None) -> Transformer:
    """Build the model of a configuration and draw its initial weights, unless it is on the meta device.

    Args:
        config: The configuration.
        vocab_size: Entries of the vocabulary.
        seed: The seed of the initial weights.
        canonical_ids: The canonical ids of the vocabulary's tokens; None: every token has its own.

    Returns:
        The model.

    Raises:
        ValueError: The configuration is invalid or the family is unknown.
    """
    model = Transformer(config, vocab_size)
    if not model.norm.weight.is_meta:
        initialise(model, seed, canonical_ids)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int, canonical_ids: CanonicalIds | None = None) -> None:
    """Fill every parameter from its own generator, seeded by (seed, name).

    Two models therefore start with equal values in the parameters that they share. Matrices
    are normal with standard deviation fan_in^-1/2, divided by sqrt(2 x layers) where they write to the residual stream
    (wo, w2; GPT-2). Gains are one and biases zero. A module with `init_parameter` sets its own values and those of its
    submodules. Buffers start at zero, those of a batch norm at torch's initial values, and those of a module with
    `reset_buffers` at what it sets.
    """
    reset_statistics(model)
    set_canonical_ids(model, canonical_ids)
    for name, parameter in model.named_parameters():
        fill(model, name, parameter, generator_of(seed, name, parameter.device))


@torch.no_grad()
def reset_statistics(model: Transformer) -> None:
    """Set buffers to zero, those of a batch norm to torch's initial values, and others by `reset_buffers`."""
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
        elif (reset_buffers := getattr(module, "reset_buffers", None)) is not None:
            reset_buffers()


@torch.no_grad()
def set_canonical_ids(model: Transformer, canonical_ids: CanonicalIds | None) -> None:
    """Pass the canonical ids to the modules that hash them; None: every token has its own, as after a reset."""
    if canonical_ids is None:
        return
    setters = [getattr(module, "set_canonical_ids", None) for module in model.modules()]
    ids = canonical_ids() if any(setters) else []
    for setter in setters:
        if setter is not None:
            setter(ids)


def generator_of(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the generator of a parameter's initial values.

    Args:
        seed: The seed of the run.
        name: The parameter's name in the model.
        device: The device of the generator.

    Returns:
        A generator whose state depends only on seed and name.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def fill(model: Transformer, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Fill `parameter` with the initial values of the model's parameter of that name.

    Args:
        model: The model that the parameter belongs to.
        name: The parameter's name in the model.
        parameter: The tensor to fill, of the parameter's shape.
        generator: See `generator_of`.
    """
    path = name.split(".")
    for depth in range(1, len(path)):
        init_parameter = getattr(model.get_submodule(".".join(path[:depth])), "init_parameter", None)
        if init_parameter is not None:
            init_parameter(".".join(path[depth:]), parameter, generator)
            return
    _default_init(path[-2:], parameter, model.size, generator)


def _default_init(path: list[str], parameter: Tensor, size: Size, generator: torch.Generator) -> None:
    if path[-1] == "bias":
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        std = parameter.shape[-1] ** -0.5
        if {"wo", "w2"} & set(path):
            std /= (2 * size.layers) ** 0.5
        parameter.normal_(0.0, std, generator=generator)
