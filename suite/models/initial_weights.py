"""Initial weights: a function of (seed, name, element), the same on any number of processes.

A parameter of at most BLOCK elements is drawn at once on the CPU, from a generator seeded by (seed, name), and is the
same on every device. Each element of a larger one has a random number of its own, from a counter-based generator: a
process draws exactly its part, on the device that holds it, in chunks of CHUNK elements. These random numbers are the
same on every device too; normal values agree within the rounding of the quantile function.

Shapes: M rows of a tensor as a matrix [all but the last dimension, last dimension].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from suite.models.distributions import Constant, Distribution, Normal, probabilities
from suite.models.lookup.output_scale import OUTPUT_GAIN
from suite.models.registry import ModelConfig
from suite.models.sizes import Size
from suite.models.transformer import Transformer

CanonicalIds = Callable[[], list[int]]
"""Returns the canonical id of every token; called for models that hash them."""
BLOCK = 1 << 22
"""Most elements of a parameter that is drawn at once."""
CHUNK = 1 << 20
"""Elements of a larger one that are drawn together."""


@dataclass(frozen=True)
class Part:
    """The elements of a tensor from `start` to `stop` in dimension `dim`."""

    dim: int
    start: int
    stop: int

    def of(self, x: Tensor) -> Tensor:
        """Return a view of this part of a whole tensor."""
        return x.narrow(self.dim, self.start, self.stop - self.start)


def build(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    canonical_ids: CanonicalIds | None = None,
    fresh: Collection[str] | None = None,
    device: torch.device | None = None,
) -> Transformer:
    """Build the model of a configuration and draw its initial weights, unless it is on the meta device.

    Args:
        config: The configuration.
        vocab_size: Entries of the vocabulary.
        seed: The seed of the initial weights.
        canonical_ids: The canonical ids of the vocabulary's tokens; None: every token has its own.
        fresh: The parameters to draw; None: all. Others are for the caller to load.
        device: Where the model is built; None: the current device. Large parameters are drawn there.

    Returns:
        The model.

    Raises:
        ValueError: The configuration is invalid or the family is unknown.
    """
    with device or nullcontext():
        model = Transformer(config, vocab_size)
    if not model.norm.weight.is_meta:
        initialise(model, seed, canonical_ids, fresh)
    return model


@torch.no_grad()
def initialise(
    model: Transformer, seed: int, canonical_ids: CanonicalIds | None = None, fresh: Collection[str] | None = None
) -> None:
    """Fill parameters with their initial values: all, or those named in `fresh`; and reset buffers.

    Two models start with equal values in the parameters that they share. Matrices are normal with standard deviation
    fan_in^-1/2, divided by sqrt(2 x layers) where they write to the residual stream (wo, w2; GPT-2). Gains are one and
    biases zero. A module with `initial_values(name, shape)` returns the distributions of its own parameters and of
    those of its submodules; one with `init_parameter(name, parameter, generator)` sets them, on whole tensors of any
    size, since the values that it draws may depend on each other. Buffers start at zero, those of a batch norm at
    torch's initial values, and those of a module with `reset_buffers` at what it sets.

    Args:
        model: The model, off the meta device.
        seed: Seed of the initial weights.
        canonical_ids: The canonical ids of the vocabulary's tokens; None: every token has its own.
        fresh: The parameters to draw; None: all.
    """
    reset_statistics(model)
    set_canonical_ids(model, canonical_ids)
    for name, parameter in model.named_parameters():
        if fresh is None or name in fresh:
            fill(model, name, seed, parameter, parameter.shape)


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


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return the generator of a parameter's initial values.

    Args:
        seed: The seed of the run.
        name: The parameter's name in the model.

    Returns:
        A generator on the CPU whose state depends on the arguments alone.
    """
    return torch.Generator().manual_seed(key_of(seed, name) >> 1)


def key_of(seed: int, name: str) -> int:
    """Return 64 bits that identify the initial values of a parameter."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


@torch.no_grad()
def fill(
    model: Transformer, name: str, seed: int, own: Tensor, shape: Collection[int], part: Part | None = None
) -> None:
    """Fill a tensor with initial values of the model's parameter of that name, or with a part of them.

    Args:
        model: The model that the parameter belongs to.
        name: The parameter's name in the model.
        seed: The seed of the run.
        own: The tensor to fill, of the shape of the part.
        shape: The shape of the whole parameter.
        part: The part; None: the whole parameter.
    """
    shape = torch.Size(shape)
    law = _law(model, name, shape)
    if isinstance(law, _Hook):
        whole = torch.empty(shape, dtype=own.dtype)
        law.init_parameter(law.name, whole, generator_of(seed, name))
        own.copy_(whole if part is None else part.of(whole))
    else:
        draw(law, own, shape, part, seed, name)


def draw(law: Distribution, own: Tensor, shape: torch.Size, part: Part | None, seed: int, name: str) -> None:
    """Draw a part of a parameter; see `fill` for the other arguments.

    Args:
        law: The distribution of its elements.
        own: The tensor to fill, contiguous.
        shape: The shape of the whole parameter.
        part: The part; None: the whole parameter.
        seed: The seed of the run.
        name: The parameter's name.
    """
    if isinstance(law, Constant):
        own.fill_(law.value)
    elif math.prod(shape) <= BLOCK:
        whole = torch.empty(shape, dtype=own.dtype)
        law.fill_(whole, generator_of(seed, name))
        own.copy_(whole if part is None else part.of(whole))
    else:
        _draw_elements(law, own, shape, part or Part(0, 0, shape[0]), key_of(seed, name))


def _draw_elements(law: Distribution, own: Tensor, shape: torch.Size, part: Part, key: int) -> None:
    if own.numel() == 0:
        return
    columns = (part.start, part.stop) if part.dim == len(shape) - 1 else (0, shape[-1])
    own_MD = own.view(-1, own.shape[-1])
    at_once = max(1, CHUNK // own.shape[-1])
    for start, chunk_MD in enumerate(own_MD.split(at_once)):
        own_row_M = torch.arange(start * at_once, start * at_once + len(chunk_MD), device=own.device)
        chunk_MD.copy_(law.quantile(probabilities(_rows_of_whole(own_row_M, shape, part), columns, key)))


def _rows_of_whole(own_row_M: Tensor, shape: torch.Size, part: Part) -> Tensor:
    """Return the rows of a whole tensor that are the given rows of a part, both as matrices."""
    if part.dim == len(shape) - 1:
        return own_row_M
    inner = math.prod(shape[part.dim + 1 : -1])  # rows per index of the divided dimension
    own, whole = (part.stop - part.start) * inner, shape[part.dim] * inner
    return own_row_M // own * whole + part.start * inner + own_row_M % own


@dataclass(frozen=True)
class _Hook:
    """A module's `init_parameter`, and the parameter's name in the module."""

    init_parameter: Any
    name: str


def _law(model: Transformer, name: str, shape: torch.Size) -> Distribution | _Hook:
    """Return the distribution of a parameter's elements, or the hook that sets them: the outermost module's."""
    path = name.split(".")
    if path[-1] == OUTPUT_GAIN:  # added to modules of any family, whose own values do not know it
        return Constant(1.0)
    for depth in range(1, len(path)):
        module, inner = model.get_submodule(".".join(path[:depth])), ".".join(path[depth:])
        if (init_parameter := getattr(module, "init_parameter", None)) is not None:
            return _Hook(init_parameter, inner)
        if (initial_values := getattr(module, "initial_values", None)) is not None:
            law: Distribution = initial_values(inner, shape)
            return law
    return _default(path[-2:], shape, model.size)


def _default(path: list[str], shape: torch.Size, size: Size) -> Distribution:
    if path[-1] == "bias":
        return Constant(0.0)
    if len(shape) == 1:
        return Constant(1.0)
    std = shape[-1] ** -0.5
    if {"wo", "w2"} & set(path):
        std /= (2 * size.layers) ** 0.5
    return Normal(std)
