"""Where the modules of a family enter the transformer, and what they may request besides the hidden state.

Shapes: B rows, T tokens, D model width, W tokens of a window.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from suite.models.cache import EarlierTokens


@dataclass(frozen=True)
class Skip:
    """A module that reads at one layer and whose result is added after the feed-forward of the layer `to`."""

    module: nn.Module
    to: int


@dataclass(frozen=True)
class Attachments:
    """The modules of a family, by the points at which they enter; every module returns the dtype of its input.

    Attributes:
        feed_forwards: One per layer. Input: the normed residual stream; the result is added to the stream.
        input_embedding: Input: the token embedding; the result replaces it as the input of the first layer, so the
            module itself adds, replaces or scales.
        before_attention: By layer. Input: the residual stream, without a norm; the result is added to the stream.
        attention_values: By layer. Input: the normed input of attention; the result, of the width of all key-value
            heads, is added to the values.
        skips: By the layer at which they read. Input: the normed input of its feed-forward; the result is added to the
            stream after the feed-forward of the layer `to`, which is the same layer or a later one.
    """

    feed_forwards: Sequence[nn.Module]
    input_embedding: nn.Module | None = None
    before_attention: Mapping[int, nn.Module] = field(default_factory=dict)
    attention_values: Mapping[int, nn.Module] = field(default_factory=dict)
    skips: Mapping[int, Skip] = field(default_factory=dict)

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module with its point and layer, for messages."""
        if self.input_embedding is not None:
            yield "input_embedding", self.input_embedding
        points = {
            "feed_forwards": dict(enumerate(self.feed_forwards)),
            "before_attention": self.before_attention,
            "attention_values": self.attention_values,
            "skips": {layer: skip.module for layer, skip in self.skips.items()},
        }
        for point, modules in points.items():
            yield from ((f"{point}: layer {layer}", module) for layer, module in modules.items())


def validated(returned: object, layers: int) -> Attachments:
    """Return what a family's factory returned as `Attachments`; a list is that of the feed-forwards.

    Raises:
        ValueError: A layer does not exist, an object is not a module, or one module is used at two points.
    """
    modules = Attachments(returned) if isinstance(returned, list) else returned
    feed_forwards = modules.feed_forwards if isinstance(modules, Attachments) else modules
    count = len(feed_forwards) if isinstance(feed_forwards, list) else type(feed_forwards).__name__
    if count != layers or not isinstance(modules, Attachments):
        raise ValueError(f"feed_forwards: got {count}, allowed: a list of {layers} modules, one per layer")
    for point in ("before_attention", "attention_values", "skips"):
        for layer in getattr(modules, point):
            if layer not in range(layers):
                raise ValueError(f"{point}: got layer {layer!r}, allowed: 0 to {layers - 1}")
    for layer, skip in modules.skips.items():
        if skip.to not in range(layer, layers):
            raise ValueError(f"skips: layer {layer}: to: got {skip.to!r}, allowed: {layer} to {layers - 1}")
    first: dict[int, str] = {}
    for name, module in modules.named():
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name}: got {type(module).__name__}, allowed: a module")
        if id(module) in first:
            raise ValueError(
                f"{name}: the same module is used at {first[id(module)]}; use one module per point and layer (share "
                "tables instead)"
            )
        first[id(module)] = name
    return modules


def window_of(module: nn.Module) -> int:
    """Return how many ids a module requests for each token, its own included; 0 for none."""
    return int(getattr(module, "window", 0))


def reads_embedding(module: nn.Module) -> bool:
    """Return whether a module requests the token embedding."""
    return bool(getattr(module, "reads_embedding", False))


def call(
    module: nn.Module,
    slot: Hashable,
    x_BTD: Tensor,
    ids_BTW: Tensor | None,
    embedding_BTD: Tensor | None,
    earlier: EarlierTokens | None,
) -> Tensor:
    """Call an attached module with what it requests, in this order: ids, token embedding, rows of earlier tokens.

    Args:
        module: The module.
        slot: Identifies the module in a cache.
        x_BTD: Its input.
        ids_BTW: The ids of each token and of those before it; required if the module has a `window`.
        embedding_BTD: The token embedding; required if its `reads_embedding` is true.
        earlier: The earlier tokens of the call; required if its `reads_earlier` is true.

    Returns:
        The module's result.
    """
    requested: list[object] = []
    if window := window_of(module):
        assert ids_BTW is not None
        requested.append(ids_BTW[..., -window:])
    if reads_embedding(module):
        requested.append(embedding_BTD)
    if getattr(module, "reads_earlier", False):
        assert earlier is not None
        requested.append(functools.partial(earlier.rows, slot))
    result: Tensor = module(x_BTD, *requested)
    return result
