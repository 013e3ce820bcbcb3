"""How a family of models announces itself: a name, its options, and the feed-forward of every layer.

The transformer asks for one module per layer and knows nothing else about a family. A family is added by one
call of `register`; its options class says which fields a cell may set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from suite.models.sizes import SIZES, Size

Problem = tuple[str, object, str]
"""(field, value given, what is allowed)"""


class ModelConfig(BaseModel):
    """What every family's cell may set about its model; a family subclasses it to add options.

    `family` names an entry of the registry and `base` an entry of `sizes.SIZES`; shape fields that are None
    take the value of the base size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    family: str
    base: str
    tie_embeddings: bool = False
    layers: int | None = Field(default=None, gt=0, description="blocks; None: the base's")
    dim: int | None = Field(default=None, gt=0, description="model width; None: the base's")
    heads: int | None = Field(default=None, gt=0, description="attention heads; None: the base's")
    kv_heads: int | None = Field(default=None, gt=0, description="key and value heads; None: the base's")
    ffn_hidden: int | None = Field(default=None, gt=0, description="SwiGLU width; None: the base's")

    @property
    def size(self) -> Size:
        """The base shape with this cell's overrides applied (KeyError for an unknown base)."""
        fields = ("layers", "dim", "heads", "kv_heads", "ffn_hidden")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return replace(SIZES[self.base], **given)

    def dense(self) -> ModelConfig:
        """The dense model of the same shape, with the base's feed-forward width."""
        shape = ("base", "tie_embeddings", "layers", "dim", "heads", "kv_heads")
        return ModelConfig(family="dense", **{name: getattr(self, name) for name in shape})

    def problems(self) -> list[Problem]:
        """What is wrong across fields: (field, value given, what is allowed).

        A family extends `family_problems` instead: it is asked only once the shape is sound.
        """
        if self.base not in SIZES:
            return [("base", self.base, ", ".join(SIZES))]
        size = self.size
        if size.dim % (2 * size.heads):
            return [("dim", size.dim, f"a multiple of 2 * heads = {2 * size.heads} (rotary heads are even)")]
        if size.heads % size.kv_heads:
            return [("kv_heads", size.kv_heads, f"a divisor of heads ({size.heads})")]
        return self.family_problems()

    def family_problems(self) -> list[Problem]:
        """What is wrong with a family's own options; asked only when the base and the shape are sound."""
        return []


@dataclass(frozen=True)
class Family:
    """A registered family.

    `feed_forwards(config)` gives one module per layer. Each has `forward(x_BTD) -> y_BTD` and `cost() ->
    accounting.Cost`; it may have `after_step()`, called after each optimizer step, and
    `init_parameter(name, parameter, generator)` where the default initial weights (see
    transformer.initialise) do not fit. One with an attribute `window` is also given the ids of each token and its
    window - 1 predecessors: `forward(x_BTD, ids_BTW)`, int64, -1 where the document has none.

    `source` is the sha256 of the file an external family comes from, and `path` that file (see models.external).
    """

    name: str
    config: type[ModelConfig]
    feed_forwards: Callable[[Any], list[nn.Module]]
    has_memory: bool = False
    source: str | None = None
    path: Path | None = None


_FAMILIES: dict[str, Family] = {}


def register(entry: Family) -> Family:
    """Add a family. ValueError: a name that is taken or no name, options that are none, no maker of modules."""
    if not (isinstance(entry.name, str) and entry.name.isidentifier()):
        raise ValueError(f"name: got {entry.name!r}, allowed: letters, digits and _, e.g. my_model")
    if not (isinstance(entry.config, type) and issubclass(entry.config, ModelConfig)):
        raise ValueError(f"config: got {entry.config!r}, allowed: a subclass of ModelConfig")
    if not callable(entry.feed_forwards):
        raise ValueError(f"feed_forwards: got {entry.feed_forwards!r}, allowed: config -> one module per layer")
    if entry.name in _FAMILIES:
        raise ValueError(f"family {entry.name!r} is registered already, allowed: another name")
    _FAMILIES[entry.name] = entry
    return entry


def unregister(names: Iterable[str]) -> None:
    """Forget families, as if they had never announced themselves."""
    for name in list(names):
        del _FAMILIES[name]


def set_origin(name: str, source: str, path: Path) -> None:
    """Note the file a family comes from, and the sha256 of its content."""
    _FAMILIES[name] = replace(_FAMILIES[name], source=source, path=path)


def family(name: object) -> Family:
    """The family of that name; ValueError naming the known ones otherwise."""
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(f"family: got {name!r}, allowed: {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def families() -> list[str]:
    """The names of all registered families, sorted."""
    return sorted(_FAMILIES)
